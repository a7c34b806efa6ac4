"""The parts of gpu_check: each measures one thing on a device and says whether it is as it should be."""

"""Models on a CUDA device that is not there: which devices mix, and where the host waits for the device.

Fake tensors have a device, a shape and a dtype and no values, and a small library says that there is a device. That
proves devices and dtypes, and counts kernels, copies and questions; no number is computed, and nothing is timed.
"""

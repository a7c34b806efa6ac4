"""The public interface: what a program imports; everything else is private."""

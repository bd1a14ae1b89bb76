"""Data: sources, the host's pipeline, and augmentation on the device."""

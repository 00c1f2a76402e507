"""FP8 and NVFP4: formats, their layout in checkpoints, calibration, and quantised computation."""

"""One video on several GPUs, of one host or of several, and many videos on many machines."""

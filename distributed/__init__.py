"""One video on several GPUs of one host, and many videos on many machines."""

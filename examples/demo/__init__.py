"""What `train_gpt.py` and `sweep.py` share besides `steepest.compare`: methods, training loop, rates and report."""

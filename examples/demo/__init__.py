"""What `train_gpt.py` and `sweep.py` share besides `steepest.tools.compare`: methods, training, rates and report."""

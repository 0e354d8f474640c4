"""Training: losses, the jitted step, optimizers, and the loop around them."""

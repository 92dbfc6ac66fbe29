"""Why adversarial examples are universal: laws of the adversarial error, on many networks."""

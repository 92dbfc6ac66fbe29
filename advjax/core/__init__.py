"""What every other part of advjax builds on: balls, losses, classifiers, devices, files."""

"""Runs and models side by side: losses, predictions, generated text."""

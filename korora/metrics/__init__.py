"""Metrics: what is counted, who counts it, how processes share it, and the listener that gives it out."""

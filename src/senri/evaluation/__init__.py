"""Evaluation with controls: what a model recalls, how sure that is, and a report that shows both."""

"""Evaluation: predictions + references → scores, each with its interval and per-sample results."""

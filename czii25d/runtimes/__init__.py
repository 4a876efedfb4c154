"""Predictors of other runtimes than torch, each behind `czii25d.inference.Predictor`."""

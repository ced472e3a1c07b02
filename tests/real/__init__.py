"""Trained models: the dense baseline is reproduced, and reduced models keep their quality."""

"""Token steps with learned weights: small networks at the sites, imported or trained by distillation."""

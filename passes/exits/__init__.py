"""Items that leave a model early, by a head of their own."""

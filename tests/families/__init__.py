"""Model families: a zoo of small models and an independent oracle for token reduction."""

"""What needs an NVIDIA GPU: ``tests/gpu/run_all.sh`` runs all of it and prints one table."""

"""What every pass that trains needs: a loss to be judged by, and a state to resume from."""

"""What every pass that trains needs: data, a loss to be judged by, a schedule, and a state to resume from."""

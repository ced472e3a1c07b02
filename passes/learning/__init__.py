"""What passes that measure or train share: data, taps, losses, a schedule, and a state to resume from."""

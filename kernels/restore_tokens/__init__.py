"""Put reduced tokens back in their old places."""

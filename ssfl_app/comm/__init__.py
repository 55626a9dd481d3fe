"""Messages between server and clients: who is who, what travels, and which replies are good ones."""

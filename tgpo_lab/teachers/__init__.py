"""Where the answers of a teacher come from: a model here, a server, or the disk."""

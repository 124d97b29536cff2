"""The first-party encoder plug-ins: one file an encoder, registered like anybody's."""

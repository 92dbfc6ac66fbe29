"""Decision boundaries, read from hard labels on planes through images."""

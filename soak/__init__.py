"""Long tests of what a run promises: it is killed and fed damaged files, and bears both."""

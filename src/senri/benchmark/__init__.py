"""How fast Senri is, as a share of what the machine can do, and beside its peers: ``senri bench``."""

"""The replicas as this proxy knows them: connections, stages, offsets."""

//! Kafka-format logs on a RAID volume, or in a directory on any file system.

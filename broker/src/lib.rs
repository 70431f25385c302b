//! The Kafka wire protocol over the log store: requests in, `sendfile` out.

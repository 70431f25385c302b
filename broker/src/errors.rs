//! The one place where a cause of the log store becomes a Kafka error code.

use kafka_protocol::ResponseError;
use logstore::Error;
use logstore::batch::BatchFault;

/// The code a client expects for this cause.
#[must_use]
pub fn kafka(error: &Error) -> ResponseError {
    match error {
        // The disks failed, or refuse to promise more: another try may find the volume repaired or reopened.
        Error::Device(_)
        | Error::File { .. }
        | Error::NoSpace { .. }
        | Error::Catalog { .. }
        | Error::CatalogFull { .. }
        | Error::Poisoned { .. }
        | Error::Unplaced { .. }
        | Error::DamagedLog { .. }
        | Error::UnreadableLog { .. } => ResponseError::KafkaStorageError,
        // Told so that a consumer that seeks past them goes on; the broker's log says where to.
        Error::LostBatch { .. } => ResponseError::CorruptMessage,
        // On the way down: the client finds the next broker, or this one once it is back.
        Error::Closed | Error::Interrupted => ResponseError::NotLeaderOrFollower,
        Error::InvalidTopicName { .. } => ResponseError::InvalidTopicException,
        Error::TopicExists { .. } => ResponseError::TopicAlreadyExists,
        Error::UnknownTopic { .. } => ResponseError::UnknownTopicOrPartition,
        Error::InvalidPartitionCount { .. } => ResponseError::InvalidPartitions,
        Error::UnknownConfig { .. } | Error::InvalidConfig { .. } => ResponseError::InvalidConfig,
        Error::InvalidBatch { fault, .. } => match fault {
            BatchFault::Magic { .. } => ResponseError::UnsupportedForMessageFormat,
            BatchFault::Checksum { .. } | BatchFault::Truncated { .. } | BatchFault::Length { .. } => {
                ResponseError::CorruptMessage
            }
            _ => ResponseError::InvalidRecord,
        },
        Error::BatchTooLarge { .. } => ResponseError::MessageTooLarge,
        Error::InvalidTimestamp { .. } => ResponseError::InvalidTimestamp,
        Error::OutOfOrderSequence { .. } => ResponseError::OutOfOrderSequenceNumber,
        Error::FencedProducer { .. } => ResponseError::InvalidProducerEpoch,
        Error::InTransaction { .. } => ResponseError::InvalidTxnState,
        Error::FencedCoordinator { .. } => ResponseError::TransactionCoordinatorFenced,
        Error::OffsetOutOfRange { .. } => ResponseError::OffsetOutOfRange,
        Error::NotALogStore { .. }
        | Error::DamagedHeader { .. }
        | Error::UnsupportedFormat { .. }
        | Error::TooSmall { .. }
        | Error::InUse { .. }
        | Error::DamagedCatalog { .. } => ResponseError::UnknownServerError,
    }
}

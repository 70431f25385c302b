//! What requests look like, and a walk that checks a body against it *before* the codec sees it.
//!
//! The codec allocates an array for as many elements as the peer announces, up to 2³¹, before it reads the first; a
//! twenty-byte frame could ask for hundreds of gigabytes. The walk touches every byte the codec will, allocates
//! nothing, and passes only bodies whose arrays are really there and hold fewer than [`MAX_ELEMENTS`] in all.
//!
//! Invariant: what passes here decodes without an allocation over a constant times the frame's length. The tables
//! are checked against the codec in the tests: every served version of every API, encoded by the crate, is walked to
//! its last byte.

use kafka_protocol::messages::ApiKey;

/// The most array elements and tagged fields in one request; each costs up to some 200 bytes decoded.
pub const MAX_ELEMENTS: u32 = 128 * 1024;

/// What is wrong with a body.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// It ends in the middle of something.
    #[error("it ends too early")]
    Short,
    /// A length below zero where none may be.
    #[error("it holds a negative length")]
    NegativeLength,
    /// Too many elements.
    #[error("it holds more than {MAX_ELEMENTS} array elements")]
    TooManyElements,
    /// A tagged field whose content is not as long as it says.
    #[error("a tagged field is not as long as it says")]
    TagLength,
    /// The codec found something the walk does not look at, such as text that is no UTF-8.
    #[error("a field does not decode")]
    Field,
}

enum Shape {
    Fixed(usize),
    Text,
    Blob,
    List(&'static Shape),
    Structs(&'static Struct),
    Nested(&'static Struct),
}

use Shape::{Blob, Fixed, List, Nested, Structs, Text};

/// A field, present in versions `.0` to `.1`.
struct Field(i16, i16, Shape);

struct Struct {
    fields: &'static [Field],
    /// Tagged fields the codec knows, so it decodes their content; the others it skips by length.
    tags: &'static [(u32, Shape)],
}

const LAST: i16 = i16::MAX;
const INT8: Shape = Fixed(1);
const INT16: Shape = Fixed(2);
const INT32: Shape = Fixed(4);
const INT64: Shape = Fixed(8);
const UUID: Shape = Fixed(16);

const fn all(shape: Shape) -> Field {
    Field(0, LAST, shape)
}

const fn from(version: i16, shape: Shape) -> Field {
    Field(version, LAST, shape)
}

const fn until(version: i16, shape: Shape) -> Field {
    Field(0, version, shape)
}

const fn plain(fields: &'static [Field]) -> Struct {
    Struct { fields, tags: &[] }
}

/// The body of a request and the first version with tagged fields and compact lengths.
fn body_of(api: ApiKey) -> Option<(i16, &'static Struct)> {
    Some(match api {
        ApiKey::Produce => (9, &PRODUCE),
        ApiKey::Fetch => (12, &FETCH),
        ApiKey::ListOffsets => (6, &LIST_OFFSETS),
        ApiKey::Metadata => (9, &METADATA),
        ApiKey::OffsetCommit => (8, &OFFSET_COMMIT),
        ApiKey::OffsetFetch => (6, &OFFSET_FETCH),
        ApiKey::FindCoordinator => (3, &FIND_COORDINATOR),
        ApiKey::JoinGroup => (6, &JOIN_GROUP),
        ApiKey::Heartbeat => (4, &HEARTBEAT),
        ApiKey::LeaveGroup => (4, &LEAVE_GROUP),
        ApiKey::SyncGroup => (4, &SYNC_GROUP),
        ApiKey::DescribeGroups => (5, &DESCRIBE_GROUPS),
        ApiKey::ListGroups => (3, &LIST_GROUPS),
        ApiKey::ApiVersions => (3, &API_VERSIONS),
        ApiKey::CreateTopics => (5, &CREATE_TOPICS),
        ApiKey::DeleteTopics => (4, &DELETE_TOPICS),
        ApiKey::DeleteRecords => (2, &DELETE_RECORDS),
        ApiKey::InitProducerId => (2, &INIT_PRODUCER_ID),
        ApiKey::DescribeConfigs => (4, &DESCRIBE_CONFIGS),
        ApiKey::DeleteGroups => (2, &DELETE_GROUPS),
        ApiKey::DescribeCluster => (0, &DESCRIBE_CLUSTER),
        ApiKey::OffsetForLeaderEpoch => (4, &OFFSET_FOR_LEADER_EPOCH),
        ApiKey::DescribeProducers => (0, &DESCRIBE_PRODUCERS),
        _ => return None,
    })
}

static DELETE_RECORDS: Struct =
    plain(&[all(Structs(&plain(&[all(Text), all(Structs(&plain(&[all(INT32), all(INT64)])))]))), all(INT32)]);

static PRODUCE: Struct = plain(&[
    all(Text),
    all(INT16),
    all(INT32),
    all(Structs(&plain(&[until(12, Text), from(13, UUID), all(Structs(&plain(&[all(INT32), all(Blob)])))]))),
]);

static FETCH: Struct = Struct {
    fields: &[
        until(14, INT32),
        all(INT32),
        all(INT32),
        all(INT32),
        all(INT8),
        from(7, INT32),
        from(7, INT32),
        all(Structs(&plain(&[
            until(12, Text),
            from(13, UUID),
            all(Structs(&Struct {
                fields: &[
                    all(INT32),
                    from(9, INT32),
                    all(INT64),
                    from(12, INT32),
                    from(5, INT64),
                    all(INT32),
                ],
                tags: &[(0, UUID), (1, INT64)],
            })),
        ]))),
        from(7, Structs(&plain(&[until(12, Text), from(13, UUID), all(List(&INT32))]))),
        from(11, Text),
    ],
    tags: &[(0, Text), (1, Nested(&plain(&[all(INT32), all(INT64)])))],
};

static LIST_OFFSETS: Struct = plain(&[
    all(INT32),
    from(2, INT8),
    all(Structs(&plain(&[all(Text), all(Structs(&plain(&[all(INT32), from(4, INT32), all(INT64)])))]))),
    from(10, INT32),
]);

static METADATA: Struct = plain(&[
    all(Structs(&plain(&[from(10, UUID), all(Text)]))),
    from(4, INT8),
    Field(8, 10, INT8),
    from(8, INT8),
]);

static OFFSET_COMMIT: Struct = plain(&[
    all(Text),
    all(INT32),
    all(Text),
    from(7, Text),
    until(4, INT64),
    all(Structs(&plain(&[
        all(Text),
        all(Structs(&plain(&[all(INT32), all(INT64), from(6, INT32), all(Text)]))),
    ]))),
]);

static OFFSET_FETCH: Struct = plain(&[
    until(7, Text),
    until(7, Structs(&plain(&[all(Text), all(List(&INT32))]))),
    from(
        8,
        Structs(&plain(&[
            all(Text),
            from(9, Text),
            from(9, INT32),
            all(Structs(&plain(&[all(Text), all(List(&INT32))]))),
        ])),
    ),
    from(7, INT8),
]);

static FIND_COORDINATOR: Struct = plain(&[until(3, Text), from(1, INT8), from(4, List(&Text))]);

static JOIN_GROUP: Struct = plain(&[
    all(Text),
    all(INT32),
    from(1, INT32),
    all(Text),
    from(5, Text),
    all(Text),
    all(Structs(&plain(&[all(Text), all(Blob)]))),
    from(8, Text),
]);

static HEARTBEAT: Struct = plain(&[all(Text), all(INT32), all(Text), from(3, Text)]);

static LEAVE_GROUP: Struct =
    plain(&[all(Text), until(2, Text), from(3, Structs(&plain(&[all(Text), all(Text), from(5, Text)])))]);

static SYNC_GROUP: Struct = plain(&[
    all(Text),
    all(INT32),
    all(Text),
    from(3, Text),
    from(5, Text),
    from(5, Text),
    all(Structs(&plain(&[all(Text), all(Blob)]))),
]);

static DESCRIBE_GROUPS: Struct = plain(&[all(List(&Text)), from(3, INT8)]);

static LIST_GROUPS: Struct = plain(&[from(4, List(&Text)), from(5, List(&Text))]);

static API_VERSIONS: Struct = plain(&[from(3, Text), from(3, Text)]);

static CREATE_TOPICS: Struct = plain(&[
    all(Structs(&plain(&[
        all(Text),
        all(INT32),
        all(INT16),
        all(Structs(&plain(&[all(INT32), all(List(&INT32))]))),
        all(Structs(&plain(&[all(Text), all(Text)]))),
    ]))),
    all(INT32),
    all(INT8),
]);

static DELETE_TOPICS: Struct =
    plain(&[from(6, Structs(&plain(&[all(Text), all(UUID)]))), until(5, List(&Text)), all(INT32)]);

static INIT_PRODUCER_ID: Struct = plain(&[all(Text), all(INT32), from(3, INT64), from(3, INT16)]);

static DESCRIBE_CONFIGS: Struct =
    plain(&[all(Structs(&plain(&[all(INT8), all(Text), all(List(&Text))]))), all(INT8), from(3, INT8)]);

static DELETE_GROUPS: Struct = plain(&[all(List(&Text))]);

static DESCRIBE_CLUSTER: Struct = plain(&[all(INT8), from(1, INT8), from(2, INT8)]);

static OFFSET_FOR_LEADER_EPOCH: Struct = plain(&[
    from(3, INT32),
    all(Structs(&plain(&[all(Text), all(Structs(&plain(&[all(INT32), all(INT32), all(INT32)])))]))),
]);

static DESCRIBE_PRODUCERS: Struct = plain(&[all(Structs(&plain(&[all(Text), all(List(&INT32))])))]);

/// Checks the body of a request; returns how many bytes of it the codec will read.
pub fn check(api: ApiKey, version: i16, body: &[u8]) -> Result<usize, Malformed> {
    let Some((flexible, shape)) = body_of(api) else { return Err(Malformed::Field) };
    let mut walk = Walk { rest: body, version, flexible: version >= flexible, elements: 0 };
    walk.structure(shape)?;
    Ok(body.len() - walk.rest.len())
}

/// Steps over the tagged fields of a flexible request header; returns their length.
pub fn check_header_tags(bytes: &[u8]) -> Result<usize, Malformed> {
    let mut walk = Walk { rest: bytes, version: 0, flexible: true, elements: 0 };
    walk.tags(&[])?;
    Ok(bytes.len() - walk.rest.len())
}

struct Walk<'a> {
    rest: &'a [u8],
    version: i16,
    flexible: bool,
    elements: u32,
}

impl<'a> Walk<'a> {
    fn structure(&mut self, structure: &Struct) -> Result<(), Malformed> {
        for Field(from, until, shape) in structure.fields {
            if (*from..=*until).contains(&self.version) {
                self.value(shape)?;
            }
        }
        if self.flexible { self.tags(structure.tags) } else { Ok(()) }
    }

    fn value(&mut self, shape: &Shape) -> Result<(), Malformed> {
        match shape {
            Fixed(n) => self.skip(*n),
            Text if !self.flexible => {
                let length = i16::from_be_bytes(self.bytes()?);
                self.skip_nullable(i64::from(length))
            }
            Blob if !self.flexible => {
                let length = i32::from_be_bytes(self.bytes()?);
                self.skip_nullable(i64::from(length))
            }
            Text | Blob => {
                let length = self.uvarint()?;
                self.skip_nullable(i64::from(length) - 1)
            }
            List(element) => self.repeat(|walk| walk.value(element)),
            Structs(element) => self.repeat(|walk| walk.structure(element)),
            Nested(structure) => self.structure(structure),
        }
    }

    fn repeat(&mut self, step: impl Fn(&mut Self) -> Result<(), Malformed>) -> Result<(), Malformed> {
        let count = if self.flexible {
            i64::from(self.uvarint()?) - 1
        } else {
            i64::from(i32::from_be_bytes(self.bytes()?))
        };
        if count < -1 {
            return Err(Malformed::NegativeLength);
        }
        for _ in 0..count {
            self.count_one()?;
            step(self)?;
        }
        Ok(())
    }

    fn tags(&mut self, known: &[(u32, Shape)]) -> Result<(), Malformed> {
        for _ in 0..self.uvarint()? {
            self.count_one()?;
            let tag = self.uvarint()?;
            let length = self.uvarint()? as usize;
            let before = self.rest.len();
            match known.iter().find(|(n, _)| *n == tag) {
                Some((_, shape)) => self.value(shape)?,
                None => self.skip(length)?,
            }
            if before - self.rest.len() != length {
                return Err(Malformed::TagLength);
            }
        }
        Ok(())
    }

    fn count_one(&mut self) -> Result<(), Malformed> {
        self.elements += 1;
        if self.elements > MAX_ELEMENTS { Err(Malformed::TooManyElements) } else { Ok(()) }
    }

    fn skip(&mut self, n: usize) -> Result<(), Malformed> {
        self.rest = self.rest.get(n..).ok_or(Malformed::Short)?;
        Ok(())
    }

    /// Steps over `length` bytes; -1 stands for null.
    fn skip_nullable(&mut self, length: i64) -> Result<(), Malformed> {
        match length {
            -1 => Ok(()),
            n => self.skip(usize::try_from(n).map_err(|_| Malformed::NegativeLength)?),
        }
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let head: &'a [u8; N] = self.rest.first_chunk().ok_or(Malformed::Short)?;
        self.rest = &self.rest[N..];
        Ok(*head)
    }

    /// Exactly as lenient as the codec: a fifth byte ends it whatever it says.
    fn uvarint(&mut self) -> Result<u32, Malformed> {
        let mut value = 0u32;
        for shift in [0, 7, 14, 21, 28] {
            let [byte] = self.bytes()?;
            value |= u32::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                break;
            }
        }
        Ok(value)
    }
}

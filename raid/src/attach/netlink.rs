//! The kernel's NBD driver, by generic netlink: what is asked of it, and the socket it is asked on.
//!
//! Names and numbers are those of Linux's `nbd-netlink.h`. A request is an `nlmsghdr`, a `genlmsghdr` and attributes, in
//! the machine's own byte order; it is carried out while it is sent, and the answer waits in the socket then. Two kinds of
//! answer: the message that was asked for, and an acknowledgement with an errno, which each request asks for and which
//! comes last.
//!
//! The driver looks up the numbers of sockets in the process that asks: whoever calls must have them open.
//! `CAP_SYS_ADMIN` in the first user namespace is needed for all but [`Driver::find`].

use netlink_packet_core::{
    DecodeError, DefaultNla, Emitable, NLA_F_NESTED, NLM_F_ACK, NLM_F_REQUEST, NLMSG_ALIGNTO, NetlinkHeader,
    NetlinkMessage, NetlinkPayload, Nla, NlasIterator, Parseable, ParseableParametrized,
};
use netlink_packet_generic::constants::{
    CTRL_ATTR_FAMILY_ID, CTRL_ATTR_FAMILY_NAME, CTRL_CMD_GETFAMILY, GENL_ID_CTRL,
};
use netlink_packet_generic::{GenlFamily, GenlHeader, GenlMessage};
use rustix::io::Errno;
use rustix::net::netlink::{self, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

/// The driver's name among the families of generic netlink.
const FAMILY: &str = "nbd";
/// `NBD_GENL_VERSION`, and that of the controller's family alike.
const VERSION: u8 = 1;
/// More than any answer takes.
const ANSWER: usize = 16 << 10;

mod command {
    pub(super) const CONNECT: u8 = 1;
    pub(super) const DISCONNECT: u8 = 2;
    pub(super) const RECONFIGURE: u8 = 3;
}

mod attribute {
    pub(super) const INDEX: u16 = 1;
    pub(super) const SIZE_BYTES: u16 = 2;
    pub(super) const BLOCK_SIZE_BYTES: u16 = 3;
    pub(super) const TIMEOUT: u16 = 4;
    pub(super) const SERVER_FLAGS: u16 = 5;
    pub(super) const SOCKETS: u16 = 7;
    pub(super) const DEAD_CONN_TIMEOUT: u16 = 8;
    pub(super) const BACKEND_IDENTIFIER: u16 = 10;
    /// Within `SOCKETS`: one socket.
    pub(super) const SOCK_ITEM: u16 = 1;
    /// Within that: its number.
    pub(super) const SOCK_FD: u16 = 1;
}

/// A disk to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct NewDisk<'a> {
    /// `/dev/nbd<number>`; `None`: a free one.
    pub(super) number: Option<u32>,
    /// Bytes.
    pub(super) size: u64,
    /// Bytes of a logical block.
    pub(super) block: u64,
    /// The protocol's transmission flags.
    pub(super) flags: u16,
    /// A request that is not answered for so long is sent again, on another connection.
    pub(super) timeout: Duration,
    /// Without any connection, requests wait so long for one before they fail.
    pub(super) patience: Duration,
    /// Whose it is; told in sysfs, and to be named when it is changed.
    pub(super) backend: &'a str,
}

/// A message to the driver or from it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Message {
    command: u8,
    attributes: Vec<DefaultNla>,
}

impl GenlFamily for Message {
    fn family_name() -> &'static str {
        FAMILY
    }

    fn command(&self) -> u8 {
        self.command
    }

    fn version(&self) -> u8 {
        VERSION
    }
}

impl Emitable for Message {
    fn buffer_len(&self) -> usize {
        self.attributes.as_slice().buffer_len()
    }

    fn emit(&self, buffer: &mut [u8]) {
        self.attributes.as_slice().emit(buffer);
    }
}

impl ParseableParametrized<[u8], GenlHeader> for Message {
    fn parse_with_param(bytes: &[u8], header: GenlHeader) -> Result<Self, DecodeError> {
        let attributes = NlasIterator::new(bytes).map(|nla| DefaultNla::parse(&nla?));
        Ok(Self { command: header.cmd, attributes: attributes.collect::<Result<_, _>>()? })
    }
}

impl Message {
    /// The value of an attribute, if it is there and has `N` bytes.
    fn value<const N: usize>(&self, kind: u16) -> Option<[u8; N]> {
        let attribute = self.attributes.iter().find(|attribute| attribute.kind() == kind)?;
        let mut value = vec![0; attribute.value_len()];
        attribute.emit_value(&mut value);
        value.try_into().ok()
    }

    fn connect(disk: &NewDisk<'_>, sockets: &[i32]) -> Self {
        let index = disk.number.map(|number| u32_attribute(attribute::INDEX, number));
        let rest = [
            u64_attribute(attribute::SIZE_BYTES, disk.size),
            u64_attribute(attribute::BLOCK_SIZE_BYTES, disk.block),
            u64_attribute(attribute::TIMEOUT, disk.timeout.as_secs()),
            u64_attribute(attribute::DEAD_CONN_TIMEOUT, disk.patience.as_secs()),
            u64_attribute(attribute::SERVER_FLAGS, disk.flags.into()),
            sockets_attribute(sockets),
            string_attribute(attribute::BACKEND_IDENTIFIER, disk.backend),
        ];
        Self { command: command::CONNECT, attributes: index.into_iter().chain(rest).collect() }
    }

    fn reconfigure(number: u32, backend: &str, change: Option<DefaultNla>) -> Self {
        let whose = [
            u32_attribute(attribute::INDEX, number),
            string_attribute(attribute::BACKEND_IDENTIFIER, backend),
        ];
        Self { command: command::RECONFIGURE, attributes: whose.into_iter().chain(change).collect() }
    }

    fn disconnect(number: u32) -> Self {
        Self { command: command::DISCONNECT, attributes: vec![u32_attribute(attribute::INDEX, number)] }
    }

    /// The whole message, to go out.
    fn bytes(self, family: u16, sequence: u32) -> Vec<u8> {
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | NLM_F_ACK;
        header.sequence_number = sequence;
        let inner = GenlMessage::new(GenlHeader { cmd: self.command, version: VERSION }, self, family);
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(inner));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        bytes
    }
}

fn u32_attribute(kind: u16, value: u32) -> DefaultNla {
    DefaultNla::new(kind, value.to_ne_bytes().to_vec())
}

fn u64_attribute(kind: u16, value: u64) -> DefaultNla {
    DefaultNla::new(kind, value.to_ne_bytes().to_vec())
}

fn string_attribute(kind: u16, value: &str) -> DefaultNla {
    DefaultNla::new(kind, [value.as_bytes(), &[0]].concat())
}

fn nested_attribute(kind: u16, within: &[DefaultNla]) -> DefaultNla {
    let mut value = vec![0; within.buffer_len()];
    within.emit(&mut value);
    DefaultNla::new(kind | NLA_F_NESTED, value)
}

fn sockets_attribute(sockets: &[i32]) -> DefaultNla {
    let item = |socket: &i32| {
        let number = DefaultNla::new(attribute::SOCK_FD, socket.to_ne_bytes().to_vec());
        nested_attribute(attribute::SOCK_ITEM, &[number])
    };
    nested_attribute(attribute::SOCKETS, &sockets.iter().map(item).collect::<Vec<_>>())
}

/// The driver, and a socket to ask it on.
#[derive(Debug)]
pub(super) struct Driver {
    socket: OwnedFd,
    family: u16,
}

impl Driver {
    /// Finds the driver. `None`: this kernel has none, or has not loaded it.
    pub(super) fn find() -> Result<Option<Self>, Errno> {
        let flags = SocketFlags::CLOEXEC;
        let socket = match socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, Some(netlink::GENERIC))
        {
            Err(Errno::PROTONOSUPPORT | Errno::AFNOSUPPORT) => return Ok(None),
            socket => socket?,
        };
        // The kernel, and nobody else's answers.
        rustix::net::connect(&socket, &SocketAddrNetlink::new(0, 0))?;
        let mut driver = Self { socket, family: GENL_ID_CTRL };
        let asked = Message {
            command: CTRL_CMD_GETFAMILY,
            attributes: vec![string_attribute(CTRL_ATTR_FAMILY_NAME, FAMILY)],
        };
        match driver.ask(asked) {
            Err(Errno::NOENT) => Ok(None),
            Err(errno) => Err(errno),
            Ok(answer) => {
                let family = answer.and_then(|answer| answer.value(CTRL_ATTR_FAMILY_ID));
                driver.family = u16::from_ne_bytes(family.ok_or(Errno::BADMSG)?);
                Ok(Some(driver))
            }
        }
    }

    /// Makes a disk with one connection for each socket, which are the driver's from then on, whoever closes them. Gives
    /// its number.
    pub(super) fn connect(&self, disk: &NewDisk<'_>, sockets: &[impl AsFd]) -> Result<u32, Errno> {
        let answer = self.ask(Message::connect(disk, &numbers(sockets)))?;
        let number = answer.and_then(|answer| answer.value(attribute::INDEX)).ok_or(Errno::BADMSG)?;
        Ok(u32::from_ne_bytes(number))
    }

    /// Puts sockets in the place of connections that are dead; what is too many is let go.
    pub(super) fn reconnect(&self, number: u32, backend: &str, sockets: &[impl AsFd]) -> Result<(), Errno> {
        let change = sockets_attribute(&numbers(sockets));
        self.ask(Message::reconfigure(number, backend, Some(change))).map(drop)
    }

    /// Makes a disk larger or smaller.
    pub(super) fn resize(&self, number: u32, backend: &str, size: u64) -> Result<(), Errno> {
        let change = u64_attribute(attribute::SIZE_BYTES, size);
        self.ask(Message::reconfigure(number, backend, Some(change))).map(drop)
    }

    /// Whether the disk is that backend's and could be connected again. One that was disconnected while it was in use
    /// is still listed, and can not.
    pub(super) fn stands(&self, number: u32, backend: &str) -> Result<bool, Errno> {
        match self.ask(Message::reconfigure(number, backend, None)) {
            Ok(_) => Ok(true),
            Err(Errno::INVAL) => Ok(false),
            Err(errno) => Err(errno),
        }
    }

    /// Ends all connections of a disk, and with them what is under way on it. It is free when nobody uses it.
    pub(super) fn disconnect(&self, number: u32) -> Result<(), Errno> {
        self.ask(Message::disconnect(number)).map(drop)
    }

    /// Sends a request; gives what was answered beside the acknowledgement.
    fn ask(&self, request: Message) -> Result<Option<Message>, Errno> {
        const SEQUENCE: u32 = 1;
        let bytes = request.bytes(self.family, SEQUENCE);
        let sent = send(&self.socket, &bytes, SendFlags::empty())?;
        if sent != bytes.len() {
            return Err(Errno::MSGSIZE);
        }
        let mut answer = None;
        loop {
            let mut buffer = vec![0; ANSWER];
            // It was carried out while it was sent: an answer that is not there now does not come.
            let (received, _) = recv(&self.socket, &mut buffer, RecvFlags::DONTWAIT)?;
            buffer.truncate(received);
            match read(&buffer)? {
                Answer::Acknowledged => return Ok(answer),
                Answer::Message(message) => answer = Some(message),
            }
        }
    }
}

fn numbers(sockets: &[impl AsFd]) -> Vec<i32> {
    sockets.iter().map(|socket| socket.as_fd().as_raw_fd()).collect()
}

/// What one datagram of the kernel says.
#[derive(Debug, PartialEq, Eq)]
enum Answer {
    Message(Message),
    Acknowledged,
}

/// Reads one datagram; a refusal is its errno, and what is no answer at all `EBADMSG`.
fn read(datagram: &[u8]) -> Result<Answer, Errno> {
    let mut rest = datagram;
    let mut answer = None;
    while !rest.is_empty() {
        let message = NetlinkMessage::<GenlMessage<Message>>::deserialize(rest).map_err(|error| {
            tracing::debug!("not an answer of the kernel's NBD driver: {error}");
            Errno::BADMSG
        })?;
        let length = (message.header.length as usize).next_multiple_of(NLMSG_ALIGNTO.into());
        rest = rest.get(length..).unwrap_or_default();
        match message.payload {
            NetlinkPayload::Error(said) => match said.code {
                None => return Ok(Answer::Acknowledged),
                Some(code) => return Err(Errno::from_raw_os_error(code.get().saturating_neg())),
            },
            NetlinkPayload::InnerMessage(inner) => answer = Some(Answer::Message(inner.payload)),
            _ => return Err(Errno::BADMSG),
        }
    }
    answer.ok_or(Errno::BADMSG)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(number: Option<u32>) -> NewDisk<'static> {
        NewDisk {
            number,
            size: 0x1122_3344_5566_7788,
            block: 512,
            flags: 0x16d,
            timeout: Duration::from_secs(45),
            patience: Duration::from_secs(600),
            backend: "raid10:me",
        }
    }

    /// Reads attributes by hand: kind (with its flags) and value.
    fn attributes(mut bytes: &[u8]) -> Vec<(u16, Vec<u8>)> {
        let mut found = Vec::new();
        while !bytes.is_empty() {
            let length = usize::from(u16::from_ne_bytes([bytes[0], bytes[1]]));
            found.push((u16::from_ne_bytes([bytes[2], bytes[3]]), bytes[4..length].to_vec()));
            bytes = &bytes[length.next_multiple_of(4)..];
        }
        found
    }

    #[test]
    fn a_connect_names_all_that_the_disk_is() {
        let bytes = Message::connect(&disk(Some(3)), &[7, 9]).bytes(0x1d, 1);
        let word = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap());
        assert_eq!(word(0) as usize, bytes.len());
        assert_eq!(&bytes[4..6], 0x1d_u16.to_ne_bytes(), "the family");
        assert_eq!(&bytes[6..8], 5_u16.to_ne_bytes(), "a request, to be acknowledged");
        assert_eq!(&bytes[16..20], [1, 1, 0, 0], "CONNECT, version 1");
        let u64_of = |value: u64| value.to_ne_bytes().to_vec();
        let item = |fd: i32| {
            let inner = [8_u16.to_ne_bytes(), 1_u16.to_ne_bytes()].concat();
            let outer = [12_u16.to_ne_bytes(), 0x8001_u16.to_ne_bytes()].concat();
            [outer, inner, fd.to_ne_bytes().to_vec()].concat()
        };
        assert_eq!(
            attributes(&bytes[20..]),
            [
                (1, 3_u32.to_ne_bytes().to_vec()),
                (2, u64_of(0x1122_3344_5566_7788)),
                (3, u64_of(512)),
                (4, u64_of(45)),
                (8, u64_of(600)),
                (5, u64_of(0x16d)),
                (0x8007, [item(7), item(9)].concat()),
                (10, b"raid10:me\0".to_vec()),
            ]
        );
        let any = Message::connect(&disk(None), &[7]);
        assert_eq!(any.value::<4>(attribute::INDEX), None, "the driver chooses");
        assert_eq!(any.attributes.len(), 7);
    }

    #[test]
    fn a_change_names_the_disk_and_whose_it_is() {
        let change = Message::reconfigure(2, "x", Some(u64_attribute(attribute::SIZE_BYTES, 4096)));
        assert_eq!(change.command, 3);
        let bytes = change.bytes(0x1d, 1);
        let told = attributes(&bytes[20..]);
        assert_eq!(told[0], (1, 2_u32.to_ne_bytes().to_vec()));
        assert_eq!(told[1], (10, b"x\0".to_vec()));
        assert_eq!(told[2], (2, 4096_u64.to_ne_bytes().to_vec()));
        let end = Message::disconnect(5).bytes(0x1d, 1);
        assert_eq!((end[16], attributes(&end[20..])), (2, vec![(1, 5_u32.to_ne_bytes().to_vec())]));
    }

    #[test]
    fn answers_are_told_from_refusals_and_nonsense() {
        let index = u32_attribute(attribute::INDEX, 4);
        let message = Message { command: command::CONNECT, attributes: vec![index] };
        let answer = message.clone().bytes(0x1d, 1);
        assert_eq!(read(&answer), Ok(Answer::Message(message)));
        let acknowledgement = |code: i32| {
            let header = [36_u32.to_ne_bytes(), [2, 0, 0, 0], [0; 4], [0; 4], code.to_ne_bytes()].concat();
            [header, answer[..16].to_vec()].concat()
        };
        assert_eq!(read(&acknowledgement(0)), Ok(Answer::Acknowledged));
        assert_eq!(read(&acknowledgement(-16)), Err(Errno::BUSY));
        for nonsense in [&[][..], &[1, 2, 3], &answer[..answer.len() - 3], &[0; 64]] {
            assert_eq!(read(nonsense), Err(Errno::BADMSG), "{nonsense:?}");
        }
        // An attribute that is longer than what holds it.
        let mut lies = answer.clone();
        lies[20] = 200;
        assert_eq!(read(&lies), Err(Errno::BADMSG));
    }

    #[test]
    fn the_kernel_is_asked_for_the_driver() {
        // Loaded or not, it answers.
        Driver::find().expect("generic netlink");
    }
}

//! Headers of virtio-vsock packets, as the virtio specification lays them out: 44 bytes, little-endian.
//!
//! ```text
//! 0 src_cid u64  8 dst_cid u64  16 src_port u32  20 dst_port u32  24 len u32  28 type u16  30 op u16
//! 32 flags u32  36 buf_alloc u32  40 fwd_cnt u32
//! ```
//!
//! A header is a copy: what the guest does to its memory afterwards changes nothing. Any 44 bytes are one.

#![forbid(unsafe_code)]

/// Bytes of a header.
pub const HEADER_LEN: usize = 44;
/// The longest payload that a driver may send in one packet.
pub const MAX_PAYLOAD: usize = 64 << 10;
/// The host's CID.
pub const HOST: u64 = 2;
/// The type of stream sockets' packets.
pub const STREAM: u16 = 1;
/// Flag of `SHUTDOWN`: the sender will not receive.
pub const NO_RECEIVE: u32 = 1;
/// Flag of `SHUTDOWN`: the sender will not send.
pub const NO_SEND: u32 = 2;

/// What a packet does.
#[allow(missing_docs)] // the specification's names
pub mod op {
    pub const REQUEST: u16 = 1;
    pub const RESPONSE: u16 = 2;
    pub const RST: u16 = 3;
    pub const SHUTDOWN: u16 = 4;
    pub const RW: u16 = 5;
    pub const CREDIT_UPDATE: u16 = 6;
    pub const CREDIT_REQUEST: u16 = 7;
}

/// A packet without its payload.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Who sends.
    pub src_cid: u64,
    /// To whom.
    pub dst_cid: u64,
    /// From which port.
    pub src_port: u32,
    /// To which.
    pub dst_port: u32,
    /// Bytes of the payload.
    pub len: u32,
    /// The socket's type.
    pub kind: u16,
    /// One of [`op`].
    pub op: u16,
    /// Of `SHUTDOWN`.
    pub flags: u32,
    /// Bytes of the sender's receive buffer.
    pub buf_alloc: u32,
    /// Bytes that have left it, ever.
    pub fwd_cnt: u32,
}

impl Header {
    /// What the bytes say.
    pub fn parse(bytes: &[u8; HEADER_LEN]) -> Self {
        let mut rest = &bytes[..];
        Self {
            src_cid: u64::from_le_bytes(take(&mut rest)),
            dst_cid: u64::from_le_bytes(take(&mut rest)),
            src_port: u32::from_le_bytes(take(&mut rest)),
            dst_port: u32::from_le_bytes(take(&mut rest)),
            len: u32::from_le_bytes(take(&mut rest)),
            kind: u16::from_le_bytes(take(&mut rest)),
            op: u16::from_le_bytes(take(&mut rest)),
            flags: u32::from_le_bytes(take(&mut rest)),
            buf_alloc: u32::from_le_bytes(take(&mut rest)),
            fwd_cnt: u32::from_le_bytes(take(&mut rest)),
        }
    }

    /// Its bytes.
    pub fn emit(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        let mut rest = &mut bytes[..];
        put(&mut rest, self.src_cid.to_le_bytes());
        put(&mut rest, self.dst_cid.to_le_bytes());
        put(&mut rest, self.src_port.to_le_bytes());
        put(&mut rest, self.dst_port.to_le_bytes());
        put(&mut rest, self.len.to_le_bytes());
        put(&mut rest, self.kind.to_le_bytes());
        put(&mut rest, self.op.to_le_bytes());
        put(&mut rest, self.flags.to_le_bytes());
        put(&mut rest, self.buf_alloc.to_le_bytes());
        put(&mut rest, self.fwd_cnt.to_le_bytes());
        bytes
    }

    /// The reset that answers this packet when there is no stream it belongs to.
    #[must_use]
    pub fn reset(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: op::RST,
            ..Self::default()
        }
    }
}

/// The fields fill a header exactly, so there is always enough.
fn take<const N: usize>(from: &mut &[u8]) -> [u8; N] {
    let mut field = [0; N];
    let (head, rest) = from.split_at(N);
    field.copy_from_slice(head);
    *from = rest;
    field
}

fn put<const N: usize>(to: &mut &mut [u8], field: [u8; N]) {
    let (head, rest) = std::mem::take(to).split_at_mut(N);
    head.copy_from_slice(&field);
    *to = rest;
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn fields_stand_where_the_specification_puts_them() {
        let header = Header {
            src_cid: 3,
            dst_cid: HOST,
            src_port: 0x1020_3040,
            dst_port: 7,
            len: 9,
            kind: STREAM,
            op: op::RW,
            flags: NO_SEND,
            buf_alloc: 1 << 16,
            fwd_cnt: 5,
        };
        let bytes = header.emit();
        assert_eq!((bytes[0], bytes[8], &bytes[16..20]), (3, 2, &[0x40, 0x30, 0x20, 0x10][..]));
        assert_eq!((bytes[20], bytes[24], bytes[28], bytes[30], bytes[32]), (7, 9, 1, 5, 2));
        assert_eq!((bytes[38], bytes[40]), (1, 5));
        let reset = header.reset();
        assert_eq!((reset.src_cid, reset.dst_cid, reset.src_port, reset.op), (HOST, 3, 7, op::RST));
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_header(bytes in prop::array::uniform32(any::<u8>()), more in prop::array::uniform12(any::<u8>())) {
            let mut all = [0; HEADER_LEN];
            all[..32].copy_from_slice(&bytes);
            all[32..].copy_from_slice(&more);
            prop_assert_eq!(Header::parse(&all).emit(), all);
        }
    }
}

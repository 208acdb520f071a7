//! Big-endian fields of a buffer, and the Internet checksum (RFC 1071).

use core::net::IpAddr;
use core::ops::Range;

/// Where a field lies in its header, in bytes.
pub(crate) type Field = Range<usize>;

/// The `N` bytes of a field. `N` must be the field's length.
pub(crate) fn array<const N: usize>(buffer: &[u8], field: Field) -> [u8; N] {
    let mut value = [0; N];
    value.copy_from_slice(&buffer[field]);
    value
}

pub(crate) fn u16(buffer: &[u8], field: Field) -> u16 {
    u16::from_be_bytes(array(buffer, field))
}

pub(crate) fn u32(buffer: &[u8], field: Field) -> u32 {
    u32::from_be_bytes(array(buffer, field))
}

pub(crate) fn set(buffer: &mut [u8], field: Field, value: &[u8]) {
    buffer[field].copy_from_slice(value);
}

/// The ones' complement sum of some data, not yet folded to 16 bits, so that sums can be added up.
///
/// Overflow is out of reach: the largest packet adds less than 2^14 words of 32 bits.
pub(crate) fn sum(data: &[u8]) -> u64 {
    let mut words = data.chunks_exact(4);
    let whole: u64 = words.by_ref().map(|word| u64::from(u32(word, 0..4))).sum();
    let mut last = [0; 4];
    last[..words.remainder().len()].copy_from_slice(words.remainder());
    whole + u64::from(u32::from_be_bytes(last))
}

/// The sum over a TCP segment or UDP datagram and its pseudo-header (RFC 9293, section 3.1; RFC 8200, section 8.1).
pub(crate) fn sum_with_addresses(datagram: &[u8], src: IpAddr, dst: IpAddr, protocol: u8) -> u64 {
    let address = |address| match address {
        IpAddr::V4(address) => sum(&address.octets()),
        IpAddr::V6(address) => sum(&address.octets()),
    };
    address(src) + address(dst) + u64::from(protocol) + datagram.len() as u64 + sum(datagram)
}

/// The checksum of data with this sum: folded and complemented. Over data that holds its own checksum, 0.
pub(crate) fn checksum(sum: u64) -> u16 {
    let mut folded = sum;
    while folded > 0xffff {
        folded = (folded & 0xffff) + (folded >> 16);
    }
    !(folded as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sum_of_the_example_in_rfc_1071() {
        let data = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(checksum(sum(&data)), !0xddf2);
    }

    #[test]
    fn odd_data_is_padded_with_zeros() {
        for len in 1..8 {
            let padded = [&[0xa5; 8][..len], &[0; 8][len..]].concat();
            assert_eq!(sum(&[0xa5; 8][..len]), sum(&padded), "{len} bytes");
        }
    }

    #[test]
    fn carries_fold_more_than_once() {
        assert_eq!(checksum(0x1_ffff_ffff), !1);
        assert_eq!(checksum(0xffff_ffff_ffff_ffff), 0);
        assert_eq!(checksum(0), 0xffff);
    }
}

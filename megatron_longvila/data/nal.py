"""Which packets of H.264 hold a frame that no other refers to, as their headers say, damaged or not (ITU-T H.264, 7.3.1 and 7.4.1)."""

from __future__ import annotations

_START_CODE = b"\x00\x00\x01"
_SLICES = (1, 2, 5)  # nal_unit_type of a slice, of a slice's partition A, and of a slice of an IDR picture


def is_unreferenced(packet: bytes, extradata: bytes | None) -> bool:
    """Whether every slice of a packet of the stream with this `extradata` says so. One without slices, or that breaks off, does not."""
    slices = [header for header in _headers(packet, extradata) if header & 31 in _SLICES]
    return bool(slices) and not any(header >> 5 & 3 for header in slices)  # nal_ref_idc


def _headers(packet: bytes, extradata: bytes | None) -> list[int]:
    """The first byte of each NAL unit; none where the lengths do not add up to the packet."""
    if not extradata or len(extradata) < 7 or extradata[0] != 1:  # Annex B: start codes part the units
        return [unit[0] for unit in packet.split(_START_CODE)[1:] if unit]
    size = (extradata[4] & 3) + 1  # of the length before each unit, in an avcC box (ISO/IEC 14496-15, 5.3.3.1)
    headers, place = [], 0
    while place + size < len(packet):
        headers.append(packet[place + size])
        place += size + int.from_bytes(packet[place : place + size], "big")
    return headers if place == len(packet) else []

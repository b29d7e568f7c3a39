"""Masking of personal data: e-mail addresses and public IP addresses become ones that the standards set aside."""

import ipaddress
import re

from megalite.text.clean.rules import Privacy

_EMAIL = re.compile(
    r"(?<![\w.+%-])[A-Za-z0-9_][A-Za-z0-9._%+-]{0,63}@"
    r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}[A-Za-z]{2,63}(?![\w-])"
)
_IPV4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?!\w|\.\d)")
_IPV6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}(?:[0-9A-Fa-f]{1,4}|(?:\d{1,3}\.){3}\d{1,3})?(?![\w:])")


def mask(text: str, rules: Privacy, masked: dict[str, int]) -> str:
    """The text with its e-mail and public IP addresses replaced; `masked` counts them as `email`, `ipv4`, `ipv6`.

    Private, loopback and otherwise reserved IP addresses tell nothing of a person and stay. Dotted version numbers of
    four parts cannot be told from addresses and are masked where they would be public ones.
    """
    if rules.mask_emails and "@" in text:
        text, count = _EMAIL.subn(lambda match: rules.email, text)
        if count:
            masked["email"] = masked.get("email", 0) + count
    if rules.mask_ips:
        if text.count(":") >= 2:
            text = _mask_addresses(text, _IPV6, rules.ipv6, "ipv6", masked)
        text = _mask_addresses(text, _IPV4, rules.ipv4, "ipv4", masked)
    return text


def _mask_addresses(text: str, pattern: re.Pattern[str], replacement: str, name: str, masked: dict[str, int]) -> str:
    def replace(match: re.Match[str]) -> str:
        try:
            public = ipaddress.ip_address(match.group()).is_global
        except ValueError:  # a time of day, a number with leading zeros, a part above 255
            return match.group()
        if not public:
            return match.group()
        masked[name] = masked.get(name, 0) + 1
        return replacement

    return pattern.sub(replace, text)

"""Documents from web archives: the readable text of each HTML response (optional: fastwarc and resiliparse)."""

from collections.abc import Iterator
from pathlib import Path

from megalite.errors import UserError
from megalite.text.records import DAMAGED, INVALID_UTF8, BadRecord, Document, OnBad, ReadCounter, too_long

TEXT_TYPES = ("text/html", "application/xhtml+xml", "text/plain")


def read_warc(path: Path, on_bad: OnBad, counter: ReadCounter, limit: int) -> Iterator[Document]:
    """The main text of every HTML or plain response of a `.warc`, `.warc.gz` or `.warc.zst` file.

    Boilerplate (navigation, lists of links, footers) is left out. `extra` holds `url`, `date` and `id` of the record.
    Responses that are no text (pictures, style sheets) are passed over, as they hold no document.

    Raises:
        UserError: the optional libraries are missing.
    """
    try:
        from fastwarc.warc import ArchiveIterator, WarcRecordType
        from resiliparse.extract.html2text import extract_plain_text
        from resiliparse.parse.encoding import bytes_to_str, detect_encoding
    except ImportError:
        raise UserError(
            f"{path}: reading web archives needs two more libraries: pip install fastwarc resiliparse"
        ) from None
    with open(path, "rb") as file:
        try:
            for record in ArchiveIterator(file, record_types=WarcRecordType.response, parse_http=True):
                counter.lines += 1
                counter.bytes = max(counter.bytes, file.tell())
                kind = (record.http_content_type or "").lower()
                if kind not in TEXT_TYPES:
                    continue
                if record.content_length > limit:
                    on_bad(too_long(path, counter.lines, record.content_length, limit, "response"))
                    continue
                body = record.reader.read()
                if len(body) < record.content_length:
                    detail = f"the file ends {record.content_length - len(body)} bytes before its last record does"
                    on_bad(BadRecord(path, counter.lines, DAMAGED, detail))
                    return
                charset = record.http_charset or detect_encoding(body) or "utf-8"
                try:
                    page = bytes_to_str(body, charset)
                    text = page if kind == "text/plain" else extract_plain_text(page, main_content=True)
                except (UnicodeError, ValueError, LookupError) as error:
                    on_bad(BadRecord(path, counter.lines, INVALID_UTF8, f"not decodable as {charset} ({error})"))
                    continue
                headers = record.headers
                extra = {
                    "url": headers.get("WARC-Target-URI"),
                    "date": headers.get("WARC-Date"),
                    "id": record.record_id,
                }
                yield Document(text, counter.lines, extra)
        except (OSError, ValueError) as error:
            on_bad(BadRecord(path, counter.lines + 1, DAMAGED, f"not readable as a web archive ({error})"))

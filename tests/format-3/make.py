#!/usr/bin/env python3
"""Makes a data directory of format 3, and says what is in it: OUT/data and OUT/expected.json.

    make.py KURIR OUT

It was run once, with the last program of format 3, and is kept to tell how the directory came about; a later KURIR makes
another format. It needs nothing but Python's standard library.

What there is in the data directory:

- A checkpoint. In it are accounts (added, registered, and a gap where one was removed), logins, groups (with a secret,
  without its first owner, and with members that left), waiting messages, also such as were written again elsewhere, and
  files in the journal, written again and not, and in files of their own.
- The journal behind it, with a change of every kind that a server of format 3 writes, but for a login that was used after
  an hour: kinds 1 to 4, 6 to 11, and 13 to 17.
- A torn end: the server was ended by SIGKILL a moment after its last answer, and then the beginning of a batch was written
  behind its last record, up to the end of a sector. Its mark is whole, and the message behind it is not.

The texts that fill segments are of the same few words over and over, so that all of it compresses well.

expected.json has what the same program says of copies of it:

    users         by name: `password`; `inbox`, `files`, `groups`, which are the data of INBOX, MY FILE and MY GROUP; and
                  `contents`, by party and name the `sha256` and `size` of each file that is listed
    removed       accounts that are gone, with the password that they had
    tokens        that are good, with their user; as any token, until 30 days after they were made
    tokens_good_until_ms   which is this, in milliseconds since 1970
    ended_tokens  that are not good any more, with their user and what ended them
"""

import base64
import hashlib
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

PASSWORD = "surabaya"
SERVE = ["--listen", "127.0.0.1:0", "--segment-bytes", "256KiB", "--checkpoint-bytes", "256KiB"]
SEGMENT_BYTES = 256 * 1024
BLOCK_BYTES = 4096
SECTOR_BYTES = 512
MARK_BYTES = 32
DAY_MS = 24 * 60 * 60 * 1000


# The format, as far as it is needed to see what came about, and to write the torn end.


def crc32c_table():
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        yield byte


CRC32C = list(crc32c_table())


def crc32c(data, before=0):
    crc = before ^ 0xFFFFFFFF
    for byte in data:
        crc = CRC32C[(crc ^ byte) & 255] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def checksum(salt, lsn, length, summed):
    fold = ((lsn ^ length << 32) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF) >> 32
    return crc32c(summed, salt ^ fold)


def record(salt, lsn, body):
    summed = body + bytes(-(8 + len(body)) % 8)
    return struct.pack("<II", len(body), checksum(salt, lsn, len(body), summed)) + summed


def mark(salt, lsn, synced):
    return record(salt, lsn, struct.pack("<BQQ", 0, lsn, synced))


def text_field(text):
    text = text.encode()
    return (bytes([len(text)]) if len(text) < 255 else struct.pack("<BI", 255, len(text))) + text


def message_sent(sender, to, at, sender_name, to_name, text):
    head = struct.pack("<BIBIQ", 10, sender, 0, to, at)
    return head + text_field(sender_name) + text_field(to_name) + text_field(text)


def records(stream, salt, at):
    """Each whole record of a stream whose first byte stands at `at`: where it stands, and its body."""
    start = at
    while True:
        header = stream[at - start : at - start + 8]
        if len(header) < 8:
            return
        length, total = struct.unpack("<II", header)
        summed = stream[at - start + 8 : at - start + 8 + length + -(8 + length) % 8]
        if length == 0 or len(summed) < length or checksum(salt, at, length, summed) != total:
            return
        yield at, summed[:length]
        at += 8 + len(summed)


class Look:
    """What there is on the disk: the newest checkpoint, and the journal behind it."""

    def __init__(self, data):
        self.segments = sorted(int(path.stem) for path in (data / "journal").glob("*.log"))
        numbers = sorted(int(path.name) for path in (data / "checkpoint").iterdir() if path.suffix == "")
        self.items, self.moved_entries, self.moved_files, self.entries = Counter(), 0, 0, set()
        self.checkpoint, self.lsn = (numbers or [0])[-1], SEGMENT_BYTES
        with open(self.path(data, self.segments[0]), "rb") as file:
            self.salt = struct.unpack("<8sII", file.read(16))[2]
        if numbers:
            raw = (data / "checkpoint" / f"{self.checkpoint:010}").read_bytes()
            magic, version, salt, segment_bytes, _, self.lsn, _ = struct.unpack("<8sIIQQQI", raw[:44])
            assert (magic, version, salt, segment_bytes) == (b"kurirchk", 3, self.salt, SEGMENT_BYTES)
            for _, body in records(raw[44:-44], salt, 44):
                self.item(body)
            assert self.items[11] == 1, "the checkpoint has its end"
        stream = b"".join(
            self.path(data, number).read_bytes()[BLOCK_BYTES:]
            for number in self.segments
            if number >= self.lsn // SEGMENT_BYTES
        )
        stream = stream[self.lsn % SEGMENT_BYTES :]
        self.changes, self.end, self.across = Counter(), self.lsn, Counter()
        moved = set()
        for at, body in records(stream, self.salt, self.lsn):
            self.changes[body[0]] += 1
            self.end = at + 8 + len(body) + -(8 + len(body)) % 8
            if body[0] == 14:
                moved.add(struct.unpack_from("<Q", body, 1)[0])
            # It begins in one segment, and ends in the next.
            if at // SEGMENT_BYTES != (self.end - 1) // SEGMENT_BYTES:
                self.across[body[0]] += 1
        # Messages that wait in older segments.
        first = self.lsn // SEGMENT_BYTES * SEGMENT_BYTES
        self.older = sum(lsn < first and sent not in moved for sent, lsn in self.entries)
        self.older_never_moved = sum(sent == lsn < first and sent not in moved for sent, lsn in self.entries)
        self.behind_end = stream[self.end - self.lsn :]

    def item(self, body):
        kind = body[0]
        self.items[kind] += 1
        if kind == 7:
            count = struct.unpack_from("<I", body, 5)[0]
            entries = [struct.unpack_from("<QQII", body, 9 + 24 * number) for number in range(count)]
            self.moved_entries += sum(sent != lsn for sent, lsn, _, _ in entries)
            self.entries.update((sent, lsn) for sent, lsn, _, _ in entries)
        if kind == 10:
            at = 1 + 8 + 4 + 5
            at += 1 + body[at] + 8
            (lsn,), (kept,) = struct.unpack_from("<Q", body, at), struct.unpack("<Q", body[-12:-4])
            self.moved_files += lsn != kept

    @staticmethod
    def path(data, segment):
        return data / "journal" / f"{segment:010}.log"


# The program.


def environment():
    return {name: value for name, value in os.environ.items() if not name.startswith("KURIR_")}


class Server:
    def __init__(self, kurir, data, *more):
        command = [kurir, "serve", "--data", data, *SERVE, *more]
        self.log = open(data.parent / f"{data.name}.log", "ab")
        self.process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=self.log)
        said = self.process.stdout.readline().decode().split()
        assert said[:2] == ["listening", "on"], said
        host, port = said[2].rsplit(":", 1)
        self.peer = socket.create_connection((host, int(port)))
        self.replies = self.peer.makefile("rb")

    def send(self, line):
        self.peer.sendall(line.encode() + b"\n")

    def reply(self):
        line, end = self.replies.readline(), self.replies.readline()
        assert line.endswith(b"\r\n") and end == b"\r\n", (line, end)
        return json.loads(line)

    def try_(self, line):
        self.send(line)
        return self.reply()

    def ask(self, line):
        reply = self.try_(line)
        assert reply["status"] == "OK", (line[:100], reply)
        return reply

    def end(self, how=signal.SIGTERM):
        self.process.send_signal(how)
        self.process.wait()
        self.process.stdout.close()
        self.peer.close()
        self.log.close()


class World:
    """Asks the server for things, and knows what should come of them."""

    def __init__(self, kurir, data):
        self.kurir, self.data = kurir, data
        self.server = Server(kurir, data, "--registration", "open")
        self.passwords, self.tokens, self.boxes, self.files, self.groups = {}, {}, {}, {}, {}
        self.removed = {}

    def user(self, *arguments, password=None):
        command = [self.kurir, "user", *arguments, "--data", self.data]
        said = f"{password}\n".encode()
        subprocess.run(command, env=environment(), input=said, stdout=subprocess.DEVNULL, check=True)

    def known(self, name):
        self.passwords[name], self.boxes[name], self.files[name] = PASSWORD, [], {}

    def add(self, name):
        self.user("add", name, "--password-stdin", password=PASSWORD)
        self.known(name)

    def register(self, name):
        self.server.ask(f"REGISTER {name} {PASSWORD}")
        self.known(name)

    def remove(self, name):
        self.user("remove", name)
        self.removed[name] = self.passwords.pop(name)
        for users in (self.tokens, self.boxes, self.files):
            del users[name]
        for members in self.groups.values():
            if name in members:
                members.remove(name)

    def login(self, name):
        """A token, which is used from now on."""
        self.tokens[name] = self.server.ask(f"AUTH {name} {self.passwords[name]}")["data"]
        return self.tokens[name]

    def change_password(self, name, new):
        self.server.ask(f"CHANGE PASSWORD {self.tokens[name]} {self.passwords[name]} {new}")
        self.passwords[name] = new

    def message(self, sender, to, text):
        self.messages(sender, to, [text])

    def messages(self, sender, to, texts):
        for text in texts:
            self.server.send(f"SEND MESSAGE {self.tokens[sender]} {to} {text}")
        for text in texts:
            assert self.server.reply() == {"status": "OK"}
            self.boxes[to].append((sender, to, text))

    def group_message(self, sender, group, text):
        self.server.ask(f"SEND GROUP MESSAGE {self.tokens[sender]} {group} {text}")
        for member in self.groups[group]:
            if member != sender:
                self.boxes[member].append((sender, group, text))

    def inbox(self, name):
        """Has all that waits delivered."""
        found = flat(self.server.ask(f"INBOX {self.tokens[name]}")["data"])
        assert found == sorted(self.boxes[name]), name
        self.boxes[name] = []

    def file(self, sender, to, name, content):
        self.server.ask(f"SEND FILE {self.tokens[sender]} {to} {name} {base64.b64encode(content).decode()}")
        self.list(sender, to, name, content)
        self.list(to, sender, name, content)

    def group_file(self, sender, group, name, content):
        self.server.ask(f"SEND GROUP FILE {self.tokens[sender]} {group} {name} {base64.b64encode(content).decode()}")
        self.list(sender, group, name, content)
        for member in self.groups[group]:
            if member != sender:
                self.list(member, sender, name, content)

    def list(self, user, party, name, content):
        self.files[user].setdefault(party, {})[name] = content

    def delete_file(self, user, party, name):
        self.server.ask(f"DELETE FILE {self.tokens[user]} {party} {name}")
        del self.files[user][party][name]
        if not self.files[user][party]:
            del self.files[user][party]

    def create_group(self, owner, group, secret=""):
        self.server.ask(f"CREATE GROUP {self.tokens[owner]} {group} {secret}".rstrip())
        self.groups[group] = [owner]

    def join(self, user, group, secret=""):
        self.server.ask(f"JOIN GROUP {self.tokens[user]} {group} {secret}".rstrip())
        self.groups[group].append(user)

    def leave(self, user, group):
        self.server.ask(f"LEAVE GROUP {self.tokens[user]} {group}")
        self.gone(user, group)

    def gone(self, user, group):
        self.groups[group].remove(user)
        if not self.groups[group]:
            del self.groups[group]

    def add_member(self, owner, group, user):
        self.server.ask(f"ADD MEMBER {self.tokens[owner]} {group} {user}")
        self.groups[group].append(user)

    def remove_member(self, owner, group, user):
        self.server.ask(f"REMOVE MEMBER {self.tokens[owner]} {group} {user}")
        self.gone(user, group)


def flat(inbox):
    """The messages of an INBOX reply: sender, target and text."""
    said = [message for messages in inbox.values() for message in messages]
    return sorted((one["nama pengirim"], one["nama penerima"], one["pesan"]) for one in said)


def noise(name, size):
    """Bytes that look like nothing, and are the same each time."""
    blocks = (hashlib.sha256(f"{name} {number}".encode()).digest() for number in range(size // 32 + 1))
    return b"".join(blocks)[:size]


# What is done.


def begin(world, ended):
    """What the first segments have."""
    for name in ["messi", "henderson", "lineker", "pele", "garrincha"]:
        world.add(name)
    world.register("ronaldinho")
    for name in ["messi", "henderson", "lineker", "pele", "garrincha", "ronaldinho"]:
        world.login(name)

    def end(user, token, by):
        ended.append({"user": user, "token": token, "ended_by": by})

    # Logins that end: by LOGOUT, and by CHANGE PASSWORD in another one.
    kept, token = world.tokens["messi"], world.login("messi")
    world.server.ask(f"LOGOUT {token}")
    world.tokens["messi"] = kept
    end("messi", token, "LOGOUT before the checkpoint")
    token = world.tokens["lineker"]
    world.login("lineker")
    world.change_password("lineker", "malang-2026")
    end("lineker", token, "CHANGE PASSWORD before the checkpoint")

    # One with a secret and a member that left, one that its first owner left, and one that has ended.
    world.create_group("messi", "rahasia", "pintu-belakang")
    for name in ["henderson", "lineker", "pele"]:
        world.join(name, "rahasia", "pintu-belakang")
    world.leave("pele", "rahasia")
    world.create_group("henderson", "tim")
    for name in ["lineker", "messi", "garrincha", "ronaldinho"]:
        world.join(name, "tim")
    world.group_message("henderson", "tim", "saya keluar dulu, sampai jumpa")
    world.leave("henderson", "tim")
    world.create_group("pele", "santos")
    world.add_member("pele", "santos", "garrincha")
    world.create_group("ronaldinho", "sebentar")
    world.leave("ronaldinho", "sebentar")

    # Messages that wait from the beginning on, so that what stands beside them can go and they cannot.
    world.message("messi", "henderson", "halo, apa kabar?")
    world.message("henderson", "lineker", "Ça va très bien, 谢谢, naïve façade — ÄÖÜß ñ 🙂⚽")
    world.message("lineker", "messi", 'tanda "kutip", \\garis miring\\ dan\ttab, </script>')
    world.message("messi", "lineker", ("panjang " * 125).strip() + ".")
    world.message("pele", "lineker", "dari pele, sebelum ia pergi")
    world.message("lineker", "lineker", "catatan untuk diri sendiri")
    world.group_message("messi", "rahasia", "halo semua, ini rahasia")

    # Small files, which are kept in the journal, and others.
    world.file("messi", "henderson", "salam.txt", b"hallo dunia\n")
    world.file("messi", "henderson", "kosong.txt", b"")
    world.file("lineker", "messi", "diganti.txt", b"yang lama\n")
    world.file("lineker", "messi", "diganti.txt", b"yang baru\n" * 20)
    world.file("henderson", "lineker", "dihapus.txt", b"lineker tidak mau ini lagi\n")
    world.delete_file("lineker", "henderson", "dihapus.txt")
    # So many that their segment stays as it is.
    for number in range(9):
        world.file("lineker", "henderson", f"album-{number}.txt", f"halaman {number}\n".encode() * 1600)
    world.file("pele", "messi", "dari-pele.txt", b"dari pele\n")
    world.file("pele", "henderson", "besar-dari-pele.bin", noise("pele", 17_000))
    world.file("messi", "lineker", "foto-é.bin", noise("foto", 40_000))
    world.file("lineker", "henderson", "diganti.bin", noise("lama", 18_000))
    world.group_file("messi", "rahasia", "kecil-group.txt", b"kecil, untuk semua\n" * 10)
    world.group_file("henderson", "rahasia", "besar-group.bin", noise("group", 20_000))
    token = world.tokens["pele"]
    world.remove("pele")
    end("pele", token, "the user was removed before the checkpoint")


def fill(world):
    """Messages that are read at once, and a few that stay, until what stayed has been written again more than once."""
    for number in range(400):
        if number % 8 == 0:
            world.message("messi", "lineker", f"lama {number}: menunggu di segmen yang lama")
            world.message("lineker", "henderson", f"lama {number}: masih menunggu, é")
            world.group_message("henderson", "rahasia", f"lama {number}: untuk semua")
            world.file("henderson", "messi", f"lama-{number}.txt", f"file lama {number}\n".encode() * 40)
        world.messages("messi", "ronaldinho", [f"pesan {number}.{each} " + "bola " * 390 for each in range(15)])
        world.inbox("ronaldinho")
        time.sleep(0.05)
        look = Look(world.data)
        is_moved = look.moved_entries > 3 and look.moved_files and look.changes[14] and look.changes[17]
        left = SEGMENT_BYTES - look.end % SEGMENT_BYTES
        is_near = look.end // SEGMENT_BYTES == look.lsn // SEGMENT_BYTES and look.end - look.lsn + left < 150_000
        if is_moved and look.older_never_moved > 1 and is_near:
            return look.checkpoint
    raise AssertionError("there was no such checkpoint")


def go_on(world, ended):
    """What stands behind the checkpoint."""

    def end(user, token, by):
        ended.append({"user": user, "token": token, "ended_by": by})

    # Into the next segment, with a record that stands in both.
    while not (look := Look(world.data)).across:
        assert look.end // SEGMENT_BYTES == look.lsn // SEGMENT_BYTES, "no record stands in two segments; try again"
        world.messages("messi", "ronaldinho", ["terus " * 400] * 5)
        world.inbox("ronaldinho")
    kept = world.tokens["messi"]
    world.register("ronaldo")
    world.login("ronaldo")
    token = world.tokens["henderson"]
    world.server.ask(f"LOGOUT {token}")
    end("henderson", token, "LOGOUT behind the checkpoint")
    world.login("henderson")
    token = world.tokens["ronaldinho"]
    world.login("ronaldinho")
    world.change_password("ronaldinho", "porto-alegre")
    end("ronaldinho", token, "CHANGE PASSWORD behind the checkpoint")

    world.message("garrincha", "messi", "dari garrincha, sebelum ia pergi")
    world.message("ronaldinho", "messi", "baru, é ü ñ, di belakang checkpoint")
    world.group_message("messi", "rahasia", "baru untuk semua")
    world.group_message("messi", "tim", "tim, ayo!")
    # All that messi has, from before the checkpoint and from behind it.
    world.inbox("messi")
    world.message("henderson", "messi", "sesudah dibaca")
    world.message("lineker", "ronaldo", "selamat datang")
    world.message("messi", "ronaldinho", ("seribu " * 142) + "pesan.")

    world.file("messi", "ronaldo", "baru.txt", b"baru\n")
    world.file("messi", "ronaldo", "pas.bin", noise("pas", 16 * 1024))
    world.file("ronaldo", "messi", "baru-besar.bin", noise("baru", 16 * 1024 + 1))
    world.file("lineker", "henderson", "diganti.bin", noise("baru lagi", 18_500))
    world.file("messi", "henderson", "salam.txt", b"hallo lagi\n")
    world.file("garrincha", "messi", "dari-garrincha.txt", b"dari garrincha\n")
    world.group_file("lineker", "tim", "jadwal.txt", b"Senin, Rabu\n")
    world.group_file("messi", "tim", "peta.bin", noise("peta", 17_500))
    world.delete_file("henderson", "messi", "kosong.txt")
    world.delete_file("messi", "pele", "dari-pele.txt")

    world.create_group("ronaldo", "baru", "sandi-baru")
    world.join("messi", "baru", "sandi-baru")
    world.add_member("ronaldo", "baru", "henderson")
    world.add_member("ronaldo", "baru", "lineker")
    world.remove_member("ronaldo", "baru", "lineker")
    world.leave("ronaldo", "baru")
    world.join("ronaldo", "tim")
    world.leave("lineker", "tim")
    world.create_group("lineker", "sebentar-lagi")
    world.leave("lineker", "sebentar-lagi")
    token = world.tokens["garrincha"]
    world.remove("garrincha")
    end("garrincha", token, "the user was removed behind the checkpoint")
    world.inbox("ronaldo")
    good = [("messi", kept), ("messi", world.login("messi")), ("ronaldo", world.tokens["ronaldo"])]
    world.group_message("messi", "baru", "yang terakhir untuk semua")
    world.message("ronaldo", "lineker", "yang terakhir")
    return [{"user": user, "token": token} for user, token in good]


def tear(data):
    """Writes the beginning of a batch behind the last record, up to the end of a sector."""
    look = Look(data)
    start, second = look.end, look.end + MARK_BYTES
    cut = (second + 64) // SECTOR_BYTES * SECTOR_BYTES + SECTOR_BYTES
    now = int(time.time() * 1000)
    batch = mark(look.salt, start, start)
    # messi is user 0, and henderson user 1.
    batch += record(look.salt, second, message_sent(0, 1, now, "messi", "henderson", "tidak pernah dijawab " * 100))
    assert len(batch) > 2 * (cut - start), "it is torn in its first half"
    half = batch[: cut - start]
    assert not any(look.behind_end[: len(half)]), "there are zeros"
    with open(Look.path(data, start // SEGMENT_BYTES), "r+b") as file:
        file.seek(BLOCK_BYTES + start % SEGMENT_BYTES)
        file.write(half)
    again = Look(data)
    assert (again.end, again.changes[0]) == (second, look.changes[0] + 1), "only the mark is whole"
    return f"torn at {second}: {len(half) - MARK_BYTES} of {len(batch) - MARK_BYTES} bytes of a message behind a mark"


def digest(content):
    return {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}


def what_is_there(kurir, data, passwords, removed, tokens, ended):
    """What the program says of a data directory, which it changes."""
    server = Server(kurir, data)
    for one in tokens:
        assert one["user"] in str(server.ask(f"MY GROUP {one['token']}")), one
    for one in ended:
        assert server.try_(f"MY GROUP {one['token']}") == {"status": "ERROR", "data": "token tidak valid"}, one
    for name, password in removed.items():
        refused = {"status": "ERROR", "data": "username atau password salah"}
        assert server.try_(f"AUTH {name} {password}") == refused, name
    users = {}
    for name, password in passwords.items():
        token = server.ask(f"AUTH {name} {password}")["data"]
        said = {"password": password}
        for key, verb in [("inbox", "INBOX"), ("files", "MY FILE"), ("groups", "MY GROUP")]:
            said[key] = server.ask(f"{verb} {token}")["data"]
        said["contents"] = {}
        for party, names in said["files"].items():
            for file in names:
                reply = server.ask(f"DOWNLOAD FILE {token} {party} {file}")
                content = base64.b64decode(reply["data"], validate=True)
                assert reply["nama file"] == file
                said["contents"].setdefault(party, {})[file] = digest(content)
        users[name] = said
    server.end()
    return users


def compare(users, world):
    """Holds what the program says against what it was told."""
    for name, said in users.items():
        assert flat(said["inbox"]) == sorted(world.boxes[name]), name
        files = {
            party: {file: digest(content) for file, content in listed.items()}
            for party, listed in world.files[name].items()
        }
        assert said["contents"] == files, (name, said["contents"], files)
        groups = {group: members for group, members in world.groups.items() if name in members}
        assert said["groups"] == groups, (name, said["groups"], groups)


def make(world):
    """Makes everything, while the server runs."""
    ended = []
    good_until = int(time.time() * 1000) + 30 * DAY_MS
    begin(world, ended)
    checkpoint = fill(world)
    tokens = go_on(world, ended)
    time.sleep(0.2)
    # The end must not stand where a block ends.
    while not 512 <= (end := Look(world.data).end) % BLOCK_BYTES <= 2048 or end % SEGMENT_BYTES > SEGMENT_BYTES - 8192:
        world.message("ronaldo", "lineker", "yang paling akhir")
        time.sleep(0.1)
    return checkpoint, tokens, good_until, ended


def main():
    kurir, out = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    data, work = out / "data", out / "work"
    assert not data.exists(), f"{data} is there already"
    work.mkdir(parents=True)
    making = work / "making"
    world = World(kurir, making)
    try:
        checkpoint, tokens, good_until, ended = make(world)
    finally:
        # A moment after the last answer, or after something went wrong.
        world.server.end(signal.SIGKILL)
    (making / "admin.sock").unlink()
    look = Look(making)
    kinds = {1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 13, 14, 15, 16, 17}
    assert look.checkpoint == checkpoint, "there is another checkpoint; try again"
    assert kinds <= look.changes.keys(), kinds - look.changes.keys()
    assert not list(making.glob("*/*.tmp")) and len(look.segments) <= 5, look.segments
    print(tear(making))
    making.rename(data)

    users = None
    for number in range(2):
        copy = work / f"copy{number}"
        shutil.copytree(data, copy)
        # As git keeps it: no modes, and no directories without a file.
        for path in copy.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        (copy / "files" / "incoming").rmdir()
        check = subprocess.run([kurir, "check", copy], env=environment(), capture_output=True, text=True)
        assert check.returncode == 0 and "\ntorn: " in check.stdout, check
        said = what_is_there(kurir, copy, world.passwords, world.removed, tokens, ended)
        assert users in (None, said), "it says the same of every copy"
        users = said
    compare(users, world)
    print(check.stdout, end="")
    expected = {
        "users": users,
        "removed": world.removed,
        "tokens": tokens,
        "tokens_good_until_ms": good_until,
        "ended_tokens": ended,
    }
    (out / "expected.json").write_text(json.dumps(expected, indent=2, ensure_ascii=False) + "\n")
    shutil.rmtree(work)
    print(f"segments {look.segments}, checkpoint {look.checkpoint} up to {look.lsn}, journal up to {look.end}")
    print(f"items of the checkpoint by kind: {dict(sorted(look.items.items()))}")
    print(f"of which have moved: {look.moved_entries} messages in mailboxes, {look.moved_files} files")
    print(f"messages in it that wait in older segments: {look.older}, of which never moved: {look.older_never_moved}")
    print(f"records behind it that stand in two segments, by kind: {dict(look.across)}")
    print(f"changes behind it by kind (0: marks): {dict(sorted(look.changes.items()))}")


if __name__ == "__main__":
    main()

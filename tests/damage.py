#!/usr/bin/env python3
"""Damages copies of a rich kurir data directory at random, and looks at what `kurir check`, its repair and the server make
of them.

    damage.py --kurir target/release/kurir
    damage.py --kurir target/release/kurir --damages 60 --seed 7 --jobs 2 --keep rich
    damage.py --kurir target/release/kurir --seed 7 --keep rich --only 23

First it lets the program make a directory with small segments and checkpoints: accounts (one removed, one removed and made
again, one with another password), groups with and without a secret, whose members came and went, direct and group
messages, long and short, read and waiting, and small and large files, some replaced, some deleted. It ends in two ways:
`stopped` by SIGTERM, and `killed` by SIGKILL after two seconds without a request. What is in each is read through the
protocol, from a copy. With `--keep DIR` both stay in DIR and are used again; without, they stay only if there were problems.

Then, for each number up to `--damages`, it damages a copy (bits, ranges, blocks, lengths, whole files; of the checkpoint,
the journal, the stored files, sometimes two at once). `kurir check` must end by itself, with 0, 1 or 2, and without a
panic, and change nothing. After a 1, `kurir check --repair` must end with 0, and another check too, or it says with 2 why
it can do nothing. Then the server must start, and everything is read again.

These are problems:

- `check` said 0, and something is missing or other than it was (SILENT LOSS), or the server does not start;
- something is there that never was: a message, a file, a member, a login;
- a file is listed and cannot be downloaded, or an INBOX cannot be read;
- damage to one stored file alone costs anything but that file;
- a new account sees anything, or does not get just the one message that is sent to it; a new message does not arrive, or
  has an id that is not above all others in its mailbox;
- the server starts from what `check` finds damaged (that is tried now and then), and something is missing or other without
  an error that says so;
- the server does not end by SIGTERM with 0, or leaves what `check` does not call good;
- `id again`: after a repair that dropped messages, others have an id that one of those had (a column of its own, and
  counted but no problem with `--allow-ids`).

These are not, and are counted:

- `torn end`: the damage takes in the very end of the journal, what was written last, so that nothing behind it can say that
  it had been written (the README calls it a write that was not finished);
- `back`: after a repair a delivered message, a deleted or replaced file, or a member who had left is there again, because
  the record that said so was dropped.

Each problem is printed with the number that makes it again, with the same seed and the directory that was kept. A table
follows. Exit code 0: no problems; 1: there were some; 2: wrong arguments, or the directory could not be made. It needs
Python 3.8 and nothing else, takes about a second for each damage, and copies a few megabytes each time, in the directory
for temporary files.
"""

import argparse
import base64
import collections
import concurrent.futures
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time

import listening

SMALL = ["--segment-bytes", "256KiB", "--checkpoint-bytes", "512KiB"]
START_SECONDS = 20
CHECK_SECONDS = 60
ANSWER_SECONDS = 20
BLOCK = 4096
VARIANTS = ["stopped", "killed"]
NEWCOMER = "pendatang"
LOCK = threading.Lock()
# Kinds of problems that are more than a word in the output.
SILENT = "SILENT LOSS"
ID_AGAIN = "id again"


class Failure(Exception):
    """The server, or a check, did not do what it must."""


# ---------------------------------------------------------------------------------------------------------------------
# The program


class Connection:
    """One connection: a request, then its reply."""

    def __init__(self, address):
        self.socket = socket.create_connection(address, timeout=ANSWER_SECONDS)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def ask(self, line):
        try:
            self.socket.sendall(line.encode() + b"\n")
            reply = bytearray()
            while not reply.endswith(b"\r\n\r\n"):
                data = self.socket.recv(1 << 20)
                if not data:
                    raise Failure(f"the connection was closed instead of an answer to {line[:60]!r}")
                reply += data
            return json.loads(reply)
        except (OSError, ValueError) as error:
            raise Failure(f"{line[:60]!r}: {type(error).__name__}: {error}") from error

    def data(self, line):
        reply = self.ask(line)
        if reply["status"] != "OK":
            raise Failure(f"{line[:60]!r}: {reply}")
        return reply.get("data")


class Server:
    """`kurir serve` on a data directory."""

    def __init__(self, kurir, data, more=()):
        self.log_path = data + ".log"
        arguments = [kurir, "serve", "--data", data, "--listen", "127.0.0.1:0", "--registration", "open"]
        arguments += ["--registrations-per-minute-max", "0", "--groups-per-minute-max", "0", *SMALL, *more]
        with open(self.log_path, "ab") as log:
            self.begin = log.tell()
            self.process = subprocess.Popen(
                arguments, stdout=subprocess.PIPE, stderr=log, stdin=subprocess.DEVNULL
            )
        self.address = None

    def __enter__(self):
        try:
            self.listen()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *_):
        self.kill()

    def listen(self):
        """Waits until it takes connections."""
        try:
            self.address = listening.address_of(self.process, START_SECONDS)
        except listening.NotListening as error:
            raise Failure(f"{error}: {self.log()[-300:].strip()}") from None

    def log(self):
        with open(self.log_path, encoding="utf-8", errors="replace") as log:
            log.seek(self.begin)
            return log.read()

    def connect(self):
        return Connection(self.address)

    def stop(self):
        """By SIGTERM. Says the exit code."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(START_SECONDS)
        except subprocess.TimeoutExpired:
            return None

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(START_SECONDS)
        self.process.stdout.close()


def check(kurir, data, *more):
    """`kurir check`: its exit code and what it said."""
    try:
        done = subprocess.run(
            [kurir, "check", data, *more],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            timeout=CHECK_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise Failure(f"check {' '.join(more)} does not end within {CHECK_SECONDS} s") from None
    output = done.stdout.decode("utf-8", "replace")
    if "panicked" in output:
        raise Failure(f"check {' '.join(more)} panics: {output[-400:].strip()}")
    if done.returncode not in (0, 1, 2):
        raise Failure(f"check {' '.join(more)} ends with {done.returncode}: {output[-300:].strip()}")
    return done.returncode, output


def copy_directory(source, target):
    """Files and directories, but no sockets."""
    os.makedirs(target)
    for entry in os.scandir(source):
        to = os.path.join(target, entry.name)
        if entry.is_dir(follow_symlinks=False):
            copy_directory(entry.path, to)
        elif stat.S_ISREG(entry.stat(follow_symlinks=False).st_mode):
            shutil.copyfile(entry.path, to)


def files_of(data):
    """The paths of all files in it, in order, as they are called in it."""
    found = []
    for directory, _, names in os.walk(data):
        for name in names:
            path = os.path.join(directory, name)
            if stat.S_ISREG(os.lstat(path).st_mode):
                found.append(os.path.relpath(path, data))
    return sorted(found)


def read_file(*path):
    with open(os.path.join(*path), "rb") as file:
        return file.read()


def print_of(data):
    """Something that is the same if nothing in the directory has changed."""
    result = hashlib.sha256()
    for path in files_of(data):
        if path not in ("lock", "admin.sock"):
            result.update(path.encode() + b"\0" + hashlib.sha256(read_file(data, path)).digest())
    return result.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# The rich directory


class Book:
    """All that ever was, for each account. An account is a name and a number: the same name may be taken again."""

    def __init__(self):
        # Label: its name, and its passwords, the present one first.
        self.accounts = {}
        # Label: {text: [sender, target]}. All texts are different.
        self.messages = collections.defaultdict(dict)
        # Label: {id: [text, time]}, as far as they were read.
        self.ids = collections.defaultdict(dict)
        # Label: {"party name": [sums of contents]}.
        self.files = collections.defaultdict(dict)
        # Label: {group: [members that it ever had]}.
        self.groups = collections.defaultdict(dict)
        self.tokens = {}
        # The directory as it is: what `observe` says.
        self.now = {}
        # Which file the journal ends in, where what was written last begins, and where it ends.
        self.end = [None, 0, 0]

    def save(self, path):
        with open(path, "w", encoding="utf-8") as file:
            json.dump(vars(self), file)

    @classmethod
    def load(cls, path):
        book = cls()
        with open(path, encoding="utf-8") as file:
            vars(book).update(json.load(file))
        for name in ("messages", "ids", "files", "groups"):
            setattr(book, name, collections.defaultdict(dict, getattr(book, name)))
        return book


class Group:
    """A group as it is: the names of its members, and the labels of all accounts that ever were in it.

    If a repair drops the record that one has left, or was removed, it goes on getting what is sent to the group.
    """

    def __init__(self, name):
        self.name = name
        self.members = []
        self.ever = []


class Author:
    """Makes what is in the directory, and writes it into the book."""

    def __init__(self, kurir, data, rng):
        self.kurir = kurir
        self.data = data
        self.rng = rng
        self.book = Book()
        # Name: label of the account that has it now.
        self.labels = {}
        self.groups = {}
        self.number = 0
        self.server = None
        self.connection = None

    def begin(self):
        self.server = Server(self.kurir, self.data).__enter__()
        self.connection = self.server.connect()

    def end(self):
        self.connection.__exit__()
        code = self.server.stop()
        self.server.kill()
        if code != 0:
            raise Failure(f"SIGTERM ends the server with {code}")

    def continued(self, data):
        """The same on a copy of the directory."""
        other = Author(self.kurir, data, random.Random(self.rng.random()))
        other.__dict__.update(labels=dict(self.labels), number=self.number)
        path = data + ".book"
        self.book.save(path)
        other.book = Book.load(path)
        os.remove(path)
        for name, group in self.groups.items():
            other.groups[name] = copied = Group(name)
            copied.members, copied.ever = list(group.members), list(group.ever)
        return other

    # Accounts

    def account(self, name, by_command=False):
        """A new one. It logs in at once."""
        number = sum(label.startswith(name + "#") for label in self.book.accounts) + 1
        label, password = f"{name}#{number}", f"sandi-{name}-{number}"
        if by_command:
            subprocess.run(
                [self.kurir, "user", "add", name, "--password-stdin", "--data", self.data],
                input=password.encode() + b"\n",
                stdout=subprocess.DEVNULL,
                check=True,
                timeout=START_SECONDS,
            )
        else:
            self.connection.data(f"REGISTER {name} {password}")
        self.labels[name] = label
        self.book.accounts[label] = [name, [password]]
        self.book.tokens[label] = self.connection.data(f"AUTH {name} {password}")

    def token(self, name):
        return self.book.tokens[self.labels[name]]

    def new_password(self, name):
        passwords = self.book.accounts[self.labels[name]][1]
        new = f"sandi-{name}-baru-{len(passwords)}"
        self.connection.data(f"CHANGE PASSWORD {self.token(name)} {passwords[0]} {new}")
        passwords.insert(0, new)

    def remove(self, name):
        subprocess.run(
            [self.kurir, "user", "remove", name, "--data", self.data],
            stdout=subprocess.DEVNULL,
            check=True,
            timeout=START_SECONDS,
        )
        del self.labels[name]
        for group in self.groups.values():
            if name in group.members:
                group.members.remove(name)

    # Groups

    def joined(self, group, name):
        group.members.append(name)
        if self.labels[name] not in group.ever:
            group.ever.append(self.labels[name])
        names = [self.book.accounts[label][0] for label in group.ever]
        for label in group.ever:
            known = self.book.groups[label].setdefault(group.name, [])
            known += [other for other in names if other not in known]

    def create(self, group, owner, secret=""):
        self.connection.data(f"CREATE GROUP {self.token(owner)} {group} {secret}".rstrip())
        self.groups[group] = Group(group)
        self.joined(self.groups[group], owner)

    def join(self, group, name, secret=""):
        self.connection.data(f"JOIN GROUP {self.token(name)} {group} {secret}".rstrip())
        self.joined(self.groups[group], name)

    def add(self, group, name):
        self.connection.data(f"ADD MEMBER {self.token(self.groups[group].members[0])} {group} {name}")
        self.joined(self.groups[group], name)

    def leave(self, group, name):
        self.connection.data(f"LEAVE GROUP {self.token(name)} {group}")
        self.groups[group].members.remove(name)
        if not self.groups[group].members:
            del self.groups[group]

    def put_out(self, group, name):
        self.connection.data(f"REMOVE MEMBER {self.token(self.groups[group].members[0])} {group} {name}")
        self.groups[group].members.remove(name)

    # Messages

    def text(self):
        self.number += 1
        words = "".join(self.rng.choice("abcdefghij klmnop") for _ in range(self.rng.randint(3, 60)))
        text = f"pesan {self.number} {words.strip()}"
        if self.rng.random() < 0.05:
            text += " panjang" * self.rng.randint(32, 400)
        return text

    def send(self, sender, receiver):
        text = self.text()
        self.connection.data(f"SEND MESSAGE {self.token(sender)} {receiver} {text}")
        self.book.messages[self.labels[receiver]][text] = [sender, receiver]

    def send_group(self, sender, group):
        text, group = self.text(), self.groups[group]
        self.connection.data(f"SEND GROUP MESSAGE {self.token(sender)} {group.name} {text}")
        for label in group.ever:
            if label != self.labels[sender]:
                self.book.messages[label][text] = [sender, group.name]

    def some_messages(self, count):
        names = sorted(self.labels)
        for _ in range(count):
            group = self.rng.choice(sorted(self.groups))
            members = self.groups[group].members
            if self.rng.random() < 0.25 and len(members) > 1:
                self.send_group(self.rng.choice(members), group)
            else:
                self.send(*self.rng.sample(names, 2))

    def read(self, *names):
        for name in names:
            label = self.labels[name]
            read_inbox(self.connection, self.token(name), self.book.ids[label])

    # Files

    def content(self, large):
        size = self.rng.randint(17_000, 90_000) if large else self.rng.choice([0, 1, 100, 3000, 12_000])
        return self.rng.randbytes(size) if hasattr(self.rng, "randbytes") else os.urandom(size)

    def listed(self, label, party, file, sum_):
        sums = self.book.files[label].setdefault(f"{party} {file}", [])
        if sum_ not in sums:
            sums.append(sum_)

    def file(self, sender, receiver, name, large):
        content = self.content(large)
        encoded = base64.b64encode(content).decode()
        self.connection.data(f"SEND FILE {self.token(sender)} {receiver} {name} {encoded}")
        sum_ = hashlib.sha256(content).hexdigest()
        self.listed(self.labels[sender], receiver, name, sum_)
        self.listed(self.labels[receiver], sender, name, sum_)

    def group_file(self, sender, group, name, large):
        content, group = self.content(large), self.groups[group]
        encoded = base64.b64encode(content).decode()
        self.connection.data(f"SEND GROUP FILE {self.token(sender)} {group.name} {name} {encoded}")
        sum_ = hashlib.sha256(content).hexdigest()
        self.listed(self.labels[sender], group.name, name, sum_)
        for label in group.ever:
            if label != self.labels[sender]:
                self.listed(label, sender, name, sum_)

    def delete(self, name, party, file):
        self.connection.data(f"DELETE FILE {self.token(name)} {party} {file}")

    # Lives of the server

    def first_life(self):
        self.begin()
        for name in ["ani", "budi", "citra", "dewi", "eko", "fajar", "gita", "hadi"]:
            self.account(name)
        for name in ["indah", "joko", "kiki", "lusi"]:
            self.account(name, by_command=True)
        self.create("tim", "ani")
        self.create("rahasia", "budi", "kunci-rahasia")
        self.create("keluarga", "citra")
        self.create("lama", "dewi")
        for name in ["budi", "citra", "dewi", "kiki", "lusi"]:
            self.add("tim", name)
        for name in ["ani", "eko", "fajar"]:
            self.join("rahasia", name, "kunci-rahasia")
        for name in ["gita", "hadi", "indah"]:
            self.join("keluarga", name)
        self.join("lama", "eko")
        self.some_messages(1500)
        self.read("ani", "budi", "gita", "kiki")
        self.some_messages(800)
        self.end()

    def second_life(self):
        self.begin()
        for number, large in enumerate([False] * 12 + [True] * 6):
            sender, receiver = self.rng.sample(sorted(self.labels), 2)
            self.file(sender, receiver, f"berkas-{number}.bin", large)
        self.group_file("ani", "tim", "tim-kecil.txt", False)
        self.group_file("budi", "tim", "tim-besar.txt", True)
        self.file("ani", "budi", "ganti-kecil.txt", False)
        self.file("ani", "budi", "ganti-besar.txt", True)
        self.file("eko", "fajar", "hapus-besar.txt", True)
        self.file("eko", "fajar", "hapus-kecil.txt", False)
        self.leave("tim", "lusi")
        self.put_out("rahasia", "fajar")
        self.leave("lama", "dewi")
        self.some_messages(1200)
        self.remove("joko")
        self.read("citra", "fajar")
        self.end()

    def third_life(self):
        self.begin()
        self.leave("lama", "eko")
        self.create("lama", "gita", "kunci-lama")
        self.join("lama", "hadi", "kunci-lama")
        self.file("ani", "budi", "ganti-kecil.txt", True)
        self.file("ani", "budi", "ganti-besar.txt", False)
        self.delete("eko", "fajar", "hapus-besar.txt")
        self.delete("fajar", "eko", "hapus-besar.txt")
        self.delete("fajar", "eko", "hapus-kecil.txt")
        self.new_password("dewi")
        self.some_messages(1200)
        self.read("dewi", "hadi", "ani")
        self.end()

    def last_life(self):
        """Of everything something, so that it stands in the journal behind the checkpoint."""
        self.begin()
        self.account("maya")
        self.remove("kiki")
        self.account("kiki")
        self.create("baru", "maya", "kunci-baru")
        self.join("baru", "ani", "kunci-baru")
        self.join("tim", "maya")
        self.some_messages(250)
        self.file("maya", "ani", "dari-maya-kecil.txt", False)
        self.file("maya", "ani", "dari-maya-besar.txt", True)
        self.group_file("maya", "tim", "tim-maya-besar.txt", True)
        self.group_file("maya", "tim", "tim-maya-kecil.txt", False)
        self.file("budi", "citra", "ganti-lagi.txt", True)
        self.file("budi", "citra", "ganti-lagi.txt", True)
        self.file("citra", "budi", "hapus-lagi.txt", True)
        self.delete("citra", "budi", "hapus-lagi.txt")
        self.new_password("gita")
        self.leave("tim", "ani")
        self.put_out("keluarga", "hadi")
        self.some_messages(100)
        self.read("lusi", "maya")
        self.some_messages(150)

    def last_words(self, way):
        """The last message, and the end. Finds out where in the journal that is."""
        journal = os.path.join(self.data, "journal")
        before = contents(journal)
        self.send("ani", "budi")
        sent = contents(journal)
        if way == "stopped":
            self.end()
        else:
            time.sleep(2.2)
            self.server.kill()
            self.connection.__exit__()
        after = contents(journal)
        self.book.end = journal_end(before, sent, after)


def contents(directory):
    """What is in the segments. One that the server gives another name meanwhile is left out."""
    found = {}
    for name in os.listdir(directory):
        if name.endswith(".log"):
            with contextlib.suppress(FileNotFoundError):
                found[name] = read_file(directory, name)
    return found


def journal_end(before, sent, after):
    """Which file it ends in, where what was written last begins, and where it ends: behind the last change."""
    for name in sorted(after, reverse=True):
        changed = differences(before.get(name), after[name])
        if changed is None:
            continue
        last = differences(sent.get(name), after[name])
        end = changed[1]
        return [os.path.join("journal", name), last[0] if last else end - 1, end]
    return [None, 0, 0]


def differences(old, new):
    """From the first byte that is another to behind the last one. A file that was not there does not count."""
    if old is None or old == new or len(old) != len(new):
        return None
    different = [index for index in range(len(old)) if old[index] != new[index]]
    return different[0], different[-1] + 1


def make(kurir, base, seed):
    """Both variants, each with its book. Says how they are called."""
    first = os.path.join(base, "first")
    author = Author(kurir, first, random.Random(f"rich {seed}"))
    try:
        author.first_life()
        author.second_life()
        author.third_life()
    finally:
        if author.server:
            author.server.kill()
    for way in VARIANTS:
        data = os.path.join(base, way)
        copy_directory(first, data)
        other = author.continued(data)
        try:
            other.last_life()
            other.last_words(way)
        finally:
            if other.server:
                other.server.kill()
        record(kurir, base, way, other.book)
    shutil.rmtree(first)


def record(kurir, base, way, book):
    """Reads what is in the directory, from a copy of it, twice: it must be the same each time."""
    for number in range(2):
        copy = os.path.join(base, f"{way}-read")
        copy_directory(os.path.join(base, way), copy)
        code, output = check(kurir, copy)
        if code != 0:
            raise Failure(f"check of the undamaged directory ({way}) says {code}: {output}")
        with Server(kurir, copy) as server:
            now = observe(server, book)
            if server.stop() != 0:
                raise Failure("SIGTERM does not end the server with 0")
        shutil.rmtree(copy)
        if number and now != book.now:
            raise Failure(f"what is in the undamaged directory ({way}) is not the same when it is read again")
        book.now = now
    for label, seen in now.items():
        for id_, (text, waktu, *_) in seen["inbox"].items():
            book.ids[label][id_] = [text, waktu]
    problems = Report()
    judge_what_is_there(book, now, problems)
    if problems.problems:
        raise Failure(f"the book and the undamaged directory ({way}) do not agree: {problems.problems[:3]}")
    book.save(os.path.join(base, f"{way}.json"))


# ---------------------------------------------------------------------------------------------------------------------
# What is there


def read_inbox(connection, token, ids=None):
    """All that waits: {id: [text, time, sender, target]}."""
    found = {}
    for _ in range(1000):
        data = connection.data(f"INBOX {token}")
        if not data:
            return found
        for sender, messages in data.items():
            for message in messages:
                id_ = str(message["id"])
                if id_ in found or message["nama pengirim"] != sender:
                    raise Failure(f"an INBOX with an id twice, or a wrong sender: {message}")
                found[id_] = [message["pesan"], message["waktu"], sender, message["nama penerima"]]
                if ids is not None:
                    ids[id_] = [message["pesan"], message["waktu"]]
    raise Failure("an INBOX that does not become empty")


def log_in(connection, name, passwords):
    """A token, and which of the passwords is right; None if none is."""
    for index, password in enumerate(passwords):
        reply = connection.ask(f"AUTH {name} {password}")
        if reply["status"] == "OK":
            return reply["data"], index
        if reply["data"] != "username atau password salah":
            raise Failure(f"AUTH {name}: {reply}")
    return None


def download(connection, token, party, name):
    """The sum of a file's content, or why there is none."""
    try:
        reply = connection.ask(f"DOWNLOAD FILE {token} {party} {name}")
    except Failure as failure:
        return f"broken off: {failure}"
    if reply["status"] != "OK":
        return f"error: {reply['data']}"
    return hashlib.sha256(base64.b64decode(reply["data"], validate=True)).hexdigest()


def look(server, connection, token, password, old_token):
    """All that one account sees."""
    seen = {"password": password, "errors": []}
    try:
        seen["inbox"] = read_inbox(connection, token)
    except Failure as failure:
        seen["inbox"] = {}
        seen["errors"].append(f"INBOX: {failure}")
    seen["groups"] = connection.data(f"MY GROUP {token}")
    seen["files"] = {}
    for party, names in sorted(connection.data(f"MY FILE {token}").items()):
        for name in names:
            with server.connect() as other:
                seen["files"][f"{party} {name}"] = download(other, token, party, name)
    seen["old login"] = connection.ask("PING")["status"] == "OK" and (
        connection.ask(f"MY GROUP {old_token}")["status"] == "OK"
    )
    return seen


def observe(server, book, tokens=None):
    """What each account sees whose login works."""
    found = {}
    with server.connect() as connection:
        # Of a name that was taken again, the newest account first.
        for label in sorted(book.accounts, key=lambda label: label.split("#")[1], reverse=True):
            name, passwords = book.accounts[label]
            if any(book.accounts[other][0] == name for other in found):
                continue
            login = log_in(connection, name, passwords)
            if login:
                found[label] = look(server, connection, *login, book.tokens[label])
                if tokens is not None:
                    tokens[label] = login[0]
    return found


class Report:
    """What one damage led to."""

    def __init__(self):
        # Of each: what kind, and in words.
        self.problems = []
        self.back = 0
        self.lost_messages = 0
        self.lost_files = 0

    def add(self, kind, text):
        self.problems.append((kind, text))

    def kinds(self):
        """How many of each kind, and the first of it in words."""
        found = {}
        for kind, text in self.problems:
            count, first = found.get(kind, (0, text))
            found[kind] = (count + 1, first)
        return found


def judge_what_is_there(book, found, report):
    """Nothing that never was, and nothing that cannot be read."""
    for label, seen in found.items():
        for error in seen["errors"]:
            report.add("unreadable", f"{label}: {error}")
        judge_inbox(book, label, seen["inbox"], report)
        for key, sum_ in seen["files"].items():
            known = book.files[label].get(key)
            if known is None:
                report.add("made up", f"{label} has the file {key!r}, which it never had")
            elif sum_.startswith(("error", "broken")):
                report.add("unreadable", f"{label} has the file {key!r} listed, and it cannot be downloaded: {sum_}")
            elif sum_ not in known:
                report.add("made up", f"{label} has the file {key!r} with a content that it never had")
            elif book.now and book.now.get(label, {}).get("files", {}).get(key) != sum_:
                report.back += 1
        for group, members in seen["groups"].items():
            known = book.groups[label].get(group)
            if known is None:
                report.add("made up", f"{label} is in the group {group}, in which it never was")
            elif not set(members) <= set(known):
                report.add("made up", f"the group {group} has members that it never had: {sorted(set(members) - set(known))}")
            elif not set(members) <= set(book.now.get(label, {}).get("groups", {}).get(group, [])):
                report.back += 1


def judge_inbox(book, label, inbox, report):
    texts = {text: id_ for id_, (text, _) in book.ids[label].items()}
    seen = set()
    for id_, (text, waktu, sender, target) in inbox.items():
        known = book.messages[label].get(text)
        if text in seen:
            report.add("made up", f"{label} gets {text[:40]!r} twice")
        seen.add(text)
        if known != [sender, target]:
            report.add("made up", f"{label} gets {text[:40]!r} from {sender} to {target}, which was never sent to it")
        elif id_ in book.ids[label] and book.ids[label][id_] != [text, waktu]:
            report.add(ID_AGAIN, f"{label} gets {text[:40]!r} with the id {id_}, which was that of {book.ids[label][id_][0][:40]!r}")
        elif text in texts and texts[text] != id_ and int(id_) <= max(map(int, book.ids[label])):
            # Behind what was dropped, messages get ids that nobody had before.
            report.add(ID_AGAIN, f"{label} gets {text[:40]!r} with the id {id_}, and it had {texts[text]}")
        elif id_ not in book.now.get(label, {}).get("inbox", {id_: None}):
            report.back += 1


def count_lost(book, found, report):
    """How much of what was there is not, or is not as it was."""
    nothing = {"inbox": {}, "files": {}}
    for label, was in book.now.items():
        seen = found.get(label, nothing)
        report.lost_messages += sum(seen["inbox"].get(id_) != message for id_, message in was["inbox"].items())
        report.lost_files += sum(seen["files"].get(key) != sum_ for key, sum_ in was["files"].items())


def first_difference(book, found):
    """What is other than it was, in words; None if nothing is."""
    for label in book.now.keys() | found.keys():
        was, seen = book.now.get(label), found.get(label)
        if was == seen:
            continue
        if was is None or seen is None:
            return f"the login of {label} {'works' if seen else 'does not work any more'}"
        for what in was:
            if was[what] == seen[what]:
                continue
            if isinstance(was[what], dict):
                gone = [key for key in was[what] if key not in seen[what]]
                new = [key for key in seen[what] if key not in was[what]]
                other = [key for key in was[what] if key in seen[what] and was[what][key] != seen[what][key]]
                return f"{what} of {label}: missing {brief(gone)}, new {brief(new)}, other {brief(other)}"
            return f"{what} of {label}: {was[what]} was, {seen[what]} is"
    return None


def brief(keys):
    return f"{len(keys)} ({', '.join(keys[:3])}{', …' if len(keys) > 3 else ''})" if keys else "0"


def allowed_without_repair(book, found, report):
    """A server that starts from what is damaged may give less only where it says so."""
    for label, was in book.now.items():
        seen = found.get(label)
        if seen is None:
            report.add("unrepaired", f"the login of {label} does not work")
            continue
        if was["groups"] != seen["groups"]:
            report.add("unrepaired", f"groups of {label} are other than they were")
        for key, sum_ in was["files"].items():
            now = seen["files"].get(key)
            if now != sum_ and not (now or "").startswith(("error", "broken")):
                report.add("unrepaired", f"{label} has another file {key!r}, or none")
        if not any("kotak masuk tidak terbaca" in error for error in seen["errors"]) and was["inbox"] != seen["inbox"]:
            report.add("unrepaired", f"the INBOX of {label} is other than it was")


# ---------------------------------------------------------------------------------------------------------------------
# Damage


class Harm:
    """Changes to one file of a copy, and which bytes of it they were."""

    def __init__(self, data, path, kind, rng):
        self.data = data
        self.path = path
        self.kind = kind
        self.rng = rng
        # Where the journal ends, if it does in this file.
        self.end = None
        self.ranges = []
        self.words = ""

    def do(self):
        """Tries until it changes something, if something can be changed."""
        path = os.path.join(self.data, self.path)
        old = read_file(path)
        for _ in range(40):
            self.ranges = []
            new = getattr(self, self.kind.replace(" ", "_"))(bytearray(old))
            if new is None:
                os.remove(path)
                break
            if new != old:
                with open(path, "wb") as file:
                    file.write(new)
                break
        where = ", ".join(f"{begin}..{end}" for begin, end in self.ranges)
        self.words = f"{self.kind} of {self.path} {where}".strip()

    def somewhere(self, content):
        """A place: sometimes near an end, of the file or the journal, mostly where there is something."""
        if not content:
            return 0
        if self.end is not None and self.rng.random() < 0.15:
            return max(0, min(self.end, len(content)) - self.rng.randrange(1, 400))
        if self.rng.random() < 0.15:
            return min(len(content) - 1, self.rng.randrange(256))
        if self.rng.random() < 0.1:
            return max(0, len(content) - 1 - self.rng.randrange(256))
        for _ in range(30):
            at = self.rng.randrange(len(content))
            if any(content[at : at + 16]):
                break
        return at

    def some_range(self, content):
        begin = self.somewhere(content)
        length = int(2 ** self.rng.uniform(0, 17))
        self.ranges = [(begin, min(len(content), begin + length))]
        return self.ranges[0]

    def bit(self, content):
        if content:
            at = self.somewhere(content)
            content[at] ^= 1 << self.rng.randrange(8)
            self.ranges = [(at, at + 1)]
        return content

    def zeros(self, content):
        begin, end = self.some_range(content)
        content[begin:end] = bytes(end - begin)
        return content

    def random_bytes(self, content):
        begin, end = self.some_range(content)
        content[begin:end] = bytes(self.rng.randrange(256) for _ in range(end - begin))
        return content

    def cut_out(self, content):
        begin, end = self.some_range(content)
        self.ranges = [(begin, len(content))]
        del content[begin:end]
        return content

    def cut_short(self, content):
        begin = self.rng.choice([0, self.somewhere(content), len(content) // BLOCK * BLOCK // 2, len(content) - 1])
        begin = max(0, begin)
        self.ranges = [(begin, len(content))]
        del content[begin:]
        return content

    def longer(self, content):
        count = self.rng.choice([1, 8, BLOCK, 70_000])
        self.ranges = [(len(content), len(content) + count)]
        more = bytes(count) if self.rng.random() < 0.5 else bytes(self.rng.randrange(1, 256) for _ in range(count))
        return content + more

    def first_block(self, content):
        self.ranges = [(0, min(BLOCK, len(content)))]
        content[:BLOCK] = bytes(len(content[:BLOCK]))
        return content

    def two_blocks(self, content):
        blocks = max(1, len(content) // BLOCK)
        return [self.rng.randrange(blocks) * BLOCK, self.rng.randrange(blocks) * BLOCK]

    def swap(self, content):
        one, other = self.two_blocks(content)
        self.ranges = [(one, one + BLOCK), (other, other + BLOCK)]
        first, second = content[one : one + BLOCK], content[other : other + BLOCK]
        if len(first) == len(second):
            content[one : one + BLOCK], content[other : other + BLOCK] = second, first
        return content

    def block_twice(self, content):
        one, other = self.two_blocks(content)
        self.ranges = [(other, other + BLOCK)]
        block = content[one : one + BLOCK]
        content[other : other + len(block)] = block
        return content

    def remove(self, content):
        self.ranges = []

    def both_headers(self, content):
        self.ranges = [(0, 48), (len(content) - 48, len(content))]
        for begin, end in self.ranges:
            content[max(0, begin) : end] = bytes(self.rng.randrange(256) for _ in range(48))
        return content


KINDS = {
    "bit": 4,
    "zeros": 3,
    "random bytes": 3,
    "cut out": 1,
    "cut short": 2,
    "longer": 1,
    "first block": 1.5,
    "swap": 2,
    "block twice": 2,
    "remove": 1.5,
    "both headers": 2,
}


def choose_file(data, rng):
    """Which file to damage: each part of the directory is hit often, and each segment as often as the others."""
    paths = files_of(data)
    parts = {part: [path for path in paths if path.startswith(part)] for part in ("checkpoint", "journal", "files")}
    parts["other"] = [path for path in paths if path.count("/") == 0]
    weights = {"checkpoint": 3, "journal": 5, "files": 2.5, "other": 0.2}
    there = [part for part in weights if parts[part]]
    part = rng.choices(there, [weights[part] for part in there])[0]
    return part, rng.choice(parts[part])


def harm(data, book, rng):
    """One damage, sometimes two. Says which, and in which parts of the directory."""
    harms, parts = [], []
    for _ in range(2 if rng.random() < 0.15 else 1):
        part, path = choose_file(data, rng)
        kinds = {kind: weight for kind, weight in KINDS.items() if kind != "both headers" or part == "checkpoint"}
        kind = rng.choices(list(kinds), list(kinds.values()))[0]
        one = Harm(data, path, kind, rng)
        if path == book.end[0]:
            one.end = book.end[2]
        one.do()
        harms.append(one)
        parts.append(part)
    return harms, parts


def takes_in_the_end(book, harms):
    """True if what was written last in the journal is among what was damaged, in a file that is still there."""
    path, begin, end = book.end
    for one in harms:
        if one.path == path and one.kind != "remove":
            if any(low < end and begin < high for low, high in one.ranges):
                return True
    return False


# ---------------------------------------------------------------------------------------------------------------------
# One damage


class Trial:
    """One damage from its beginning to what came of it."""

    def __init__(self, options, base, books, number):
        self.options = options
        self.kurir = options.kurir
        self.rng = random.Random(f"damage {options.seed} {number}")
        self.number = number
        self.way = VARIANTS[number % len(VARIANTS)]
        self.book = books[self.way]
        self.source = os.path.join(base, self.way)
        self.work = tempfile.mkdtemp(prefix=f"kurir-damage-{number}-")
        self.data = os.path.join(self.work, "data")
        self.report = Report()
        self.harms = []
        self.parts = []
        self.outcome = "good"

    def run(self):
        try:
            copy_directory(self.source, self.data)
            self.harms, self.parts = harm(self.data, self.book, self.rng)
            self.go_on()
        except Failure as failure:
            self.report.add("server" if "server" in str(failure) else "failed", str(failure))
        except Exception as error:  # What is wrong here must not end all the others.
            self.report.add("script", f"this script failed: {type(error).__name__}: {error}")
        finally:
            shutil.rmtree(self.work, ignore_errors=True)
        kinds = self.report.kinds()
        if kinds:
            self.outcome = ID_AGAIN if list(kinds) == [ID_AGAIN] else "problem"
        return self

    def is_problem(self):
        return self.outcome == "problem" or (self.outcome == ID_AGAIN and not self.options.allow_ids)

    def kind(self):
        return self.harms[0].kind if len(self.harms) == 1 else "two at once"

    def words(self):
        return f"{self.way}: " + "; ".join(one.words for one in self.harms)

    def go_on(self):
        before = print_of(self.data)
        code, output = check(self.kurir, self.data)
        if print_of(self.data) != before:
            self.report.add("check", "check without --repair has changed the directory")
        if code == 0:
            self.start(exact=not takes_in_the_end(self.book, self.harms))
            return
        if not output.strip():
            self.report.add("check", f"check says {code} and no word")
        if self.rng.random() < 0.25 or code == 2:
            self.start_unrepaired(code)
        if code == 2:
            self.outcome = "not repairable"
            return
        self.repair()

    def repair(self):
        code, output = check(self.kurir, self.data, "--repair")
        if code == 2 and output.strip():
            self.outcome = "not repairable"
            return
        if code != 0:
            self.report.add("check", f"check --repair says {code}: {output[-300:].strip()}")
            return
        self.outcome = "repaired"
        code, output = check(self.kurir, self.data)
        if code != 0:
            self.report.add("check", f"check after the repair says {code}: {output[-300:].strip()}")
        self.start(exact=False, repaired=True)

    def start(self, exact, repaired=False):
        """Starts the server, and compares what it gives with the record."""
        tokens = {}
        with Server(self.kurir, self.data) as server:
            found = observe(server, self.book, tokens)
            count_lost(self.book, found, self.report)
            difference = first_difference(self.book, found)
            if exact and difference:
                self.report.add(SILENT, difference)
            elif difference and not repaired:
                self.outcome = "torn end"
            judge_what_is_there(self.book, found, self.report)
            if repaired:
                self.only_the_file(found)
            self.newcomer(server, found, tokens, strict=not difference)
            self.ended(server)
        code, output = check(self.kurir, self.data)
        if code != 0:
            self.report.add("check", f"check after the server has run says {code}: {output[-300:].strip()}")

    def ended(self, server):
        code = server.stop()
        if code != 0:
            self.report.add("server", f"SIGTERM ends the server with {code}")
        if "panicked" in server.log():
            self.report.add("server", "the server's log says panicked")

    def only_the_file(self, found):
        """Damage to stored files costs those files, and nothing else."""
        if any(part != "files" for part in self.parts):
            return
        for label, was in self.book.now.items():
            seen = found.get(label)
            if seen is None or any(was[what] != seen[what] for what in ("inbox", "groups", "password", "old login")):
                self.report.add("too much lost", f"damage to a stored file has changed something else of {label}")
        hit = {self.book_sum(one.path) for one in self.harms}
        for label, was in self.book.now.items():
            for key, sum_ in was["files"].items():
                if found.get(label, {"files": {}})["files"].get(key) != sum_ and sum_ not in hit:
                    self.report.add("too much lost", f"damage to a stored file has cost {label} another one, {key!r}")

    def book_sum(self, path):
        return hashlib.sha256(read_file(self.source, path)).hexdigest()

    def start_unrepaired(self, code):
        """On another copy. If it starts, it says what it cannot read."""
        other = os.path.join(self.work, "unrepaired")
        copy_directory(self.data, other)
        server = Server(self.kurir, other)
        try:
            server.listen()
        except Failure as failure:
            ended = server.process.poll()
            if ended in (0, None) or ended < 0:
                self.report.add("unrepaired", f"{failure}")
            elif "panicked" in server.log() or not server.log().strip():
                self.report.add("unrepaired", f"it ends with a panic, or no word: {failure}")
            return
        finally:
            if server.address is None:
                server.kill()
        try:
            if code == 2:
                self.report.add("unrepaired", "check says 2, and the server starts")
            allowed_without_repair(self.book, observe(server, self.book), self.report)
            if "panicked" in server.log():
                self.report.add("unrepaired", "the server panics")
        finally:
            server.kill()

    def newcomer(self, server, found, tokens, strict):
        """A new account sees nothing; new messages, groups and files are just what they are."""
        with server.connect() as connection:
            connection.data(f"REGISTER {NEWCOMER} sandi-pendatang")
            token = connection.data(f"AUTH {NEWCOMER} sandi-pendatang")
            for request in ("INBOX", "MY FILE", "MY GROUP"):
                data = connection.data(f"{request} {token}")
                if data:
                    self.report.add("newcomer", f"a new account has something: {request} gives {json.dumps(data)[:200]}")
            sender, from_token = NEWCOMER, token
            if tokens:
                label = sorted(tokens)[0]
                sender, from_token = self.book.accounts[label][0], tokens[label]
            connection.data(f"SEND MESSAGE {from_token} {NEWCOMER} selamat datang")
            inbox = list(read_inbox(connection, token).values())
            if [[row[0], *row[2:]] for row in inbox] != [["selamat datang", sender, NEWCOMER]]:
                self.report.add("newcomer", f"a new account gets other than the one message that was sent to it: {inbox[:3]}")
            self.new_group(connection, token)
            self.new_messages(connection, token, found, tokens, strict)
            self.new_file(server, token, tokens)

    def new_group(self, connection, token):
        """It has one member, and what is sent to it gets to nobody else (which `new_messages` sees)."""
        connection.data(f"CREATE GROUP {token} grup-pendatang")
        groups = connection.data(f"MY GROUP {token}")
        if groups != {"grup-pendatang": [NEWCOMER]}:
            self.report.add("newcomer", f"a new group is not what was made: {groups}")
        connection.data(f"SEND GROUP MESSAGE {token} grup-pendatang hanya untuk grup ini")

    def new_messages(self, connection, token, found, tokens, strict):
        for label, own in sorted(tokens.items()):
            name, known = self.book.accounts[label][0], self.book.ids[label]
            connection.data(f"SEND MESSAGE {token} {name} sesudah kerusakan")
            inbox = read_inbox(connection, own)
            if [row[0] for row in inbox.values()] != ["sesudah kerusakan"]:
                self.report.add("newcomer", f"{label} gets other than the one new message: {list(inbox.values())[:3]}")
                continue
            (id_,) = inbox
            given = found[label]["inbox"]
            if any(int(id_) <= int(other) for other in given):
                self.report.add("newcomer", f"{label} gets a new message with the id {id_}, which is not above all others")
            elif id_ in known and self.outcome != "torn end":
                kind = "newcomer" if strict else ID_AGAIN
                self.report.add(kind, f"{label} gets a new message with the id {id_}, which was that of {known[id_][0][:40]!r}")

    def new_file(self, server, token, tokens):
        """Small and large files can be sent and downloaded, and are what was sent."""
        for label in sorted(tokens)[:1]:
            for size in (100, 30_000):
                content = bytes(index % 251 for index in range(size))
                with server.connect() as connection:
                    name = self.book.accounts[label][0]
                    encoded = base64.b64encode(content).decode()
                    connection.data(f"SEND FILE {token} {name} baru-{size}.bin {encoded}")
                    sum_ = download(connection, tokens[label], NEWCOMER, f"baru-{size}.bin")
                    if sum_ != hashlib.sha256(content).hexdigest():
                        self.report.add("newcomer", f"a new file of {size} bytes does not come as it was sent: {sum_}")


# ---------------------------------------------------------------------------------------------------------------------
# All of them


COLUMNS = ["good", "torn end", "repaired", "not repairable", ID_AGAIN, "problem"]


def table(trials, title, rows_of):
    counts = collections.defaultdict(collections.Counter)
    lost = collections.Counter()
    for trial in trials:
        for row in rows_of(trial):
            counts[row][trial.outcome] += 1
            lost[row] = max(lost[row], trial.report.lost_messages + trial.report.lost_files)
    print(f"\n{title:14}" + "".join(f"{column:>15}" for column in COLUMNS) + f"{'most lost':>15}")
    for row in sorted(counts):
        print(f"{row:14}" + "".join(f"{counts[row][column]:15}" for column in COLUMNS) + f"{lost[row]:15}")


def run_all(options, base):
    books = {way: Book.load(os.path.join(base, f"{way}.json")) for way in VARIANTS}
    numbers = range(options.damages) if options.only is None else [options.only]
    trials = []

    def one(number):
        trial = Trial(options, base, books, number).run()
        with LOCK:
            tell(trial, options, base)
            trials.append(trial)
            if len(trials) % 50 == 0:
                print(f"{len(trials)} damages, {sum(done.is_problem() for done in trials)} with problems", flush=True)

    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        for future in [pool.submit(one, number) for number in numbers]:
            future.result()
    return trials


def tell(trial, options, base):
    if trial.is_problem():
        for kind, (count, first) in trial.report.kinds().items():
            more = f" (and {count - 1} more)" if count > 1 else ""
            print(f"PROBLEM {trial.number}: {trial.words()}: {kind}: {first}{more}")
        print(f"        again: --seed {options.seed} --keep {base} --only {trial.number}", flush=True)
    elif trial.outcome == "torn end":
        print(f"torn end {trial.number}: {trial.words()}: {trial.report.lost_messages} messages lost", flush=True)
    elif options.only is not None:
        print(f"{trial.number}: {trial.words()}: {trial.outcome}", flush=True)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("--kurir", required=True, help="the program")
    parser.add_argument("--damages", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1_000_000))
    parser.add_argument("--keep", help="where the rich directory is kept; one that is there is used again")
    parser.add_argument("--only", type=int, help="the damage with this number alone")
    parser.add_argument("--jobs", type=int, default=1, help="so many damages at once")
    parser.add_argument("--allow-ids", action="store_true", help="messages may get ids of others that a repair dropped")
    return parser.parse_args()


def prepared(options):
    """The directory with both variants in it, made now or before."""
    base = os.path.abspath(options.keep) if options.keep else tempfile.mkdtemp(prefix="kurir-rich-")
    os.makedirs(base, exist_ok=True)
    if not all(os.path.exists(os.path.join(base, f"{way}.json")) for way in VARIANTS):
        if os.listdir(base):
            raise Failure(f"{base} is not empty, and has no directory of this script")
        make(options.kurir, base, options.seed)
    for way in VARIANTS:
        paths = files_of(os.path.join(base, way))
        size = sum(os.path.getsize(os.path.join(base, way, path)) for path in paths)
        print(f"{way}: {len(paths)} files, {size:,} bytes", flush=True)
    return base


def main():
    options = arguments()
    options.kurir = os.path.abspath(options.kurir)
    begin = time.monotonic()
    print(f"seed {options.seed}", flush=True)
    try:
        base = prepared(options)
    except (Failure, OSError, subprocess.SubprocessError) as error:
        print(f"the rich directory could not be made: {error}", file=sys.stderr)
        return 2
    made = time.monotonic()
    trials = run_all(options, base)
    table(trials, "kind", lambda trial: [trial.kind()] if trial.harms else [])
    table(trials, "part", lambda trial: sorted(set(trial.parts)))
    print()
    with_problems = sum(trial.is_problem() for trial in trials)
    kinds = collections.Counter(kind for trial in trials for kind in trial.report.kinds())
    for kind, count in sorted(kinds.items()):
        print(f"{'counted' if kind == ID_AGAIN and options.allow_ids else 'problem'}: {kind}, in {count} damages")
    print(
        f"{len(trials)} damages; back after a repair {sum(trial.report.back for trial in trials)}; with problems {with_problems};"
        f" {made - begin:.0f} s to make the directory, {time.monotonic() - made:.0f} s for the damages"
    )
    if with_problems:
        print(f"the directory is kept in {base}")
    elif not options.keep:
        shutil.rmtree(base)
    return 1 if with_problems else 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Kills a kurir server with SIGKILL, again and again under load, and counts what becomes of the messages.

    kills.py --kurir target/release/kurir
    kills.py --kurir target/release/kurir --messages 500000 --kills 5 --seed 7

It starts `kurir serve --demo`. Each of the three users sends on two connections, to both others and to the group, many
requests ahead, and counts the replies. At a random moment the server is killed and started again. What waits is then
read at once, or never, or in part, or all the while that messages are sent, so that mailboxes are sometimes long and
sometimes empty. Half of the messages go to a data directory with small segments and checkpoints, half to one with the
usual sizes (`--sizes`); now and then the server is also killed while it starts, and `kurir check` looks at what a kill
left.

These are problems:

- an acknowledged message that a receiver did not get, or that it got twice;
- a message that came again after a kill with another id, or that came again later than in the first replies after a
  start (those that came again as they may are counted as `again`);
- messages of one connection in another order, or with a hole between them;
- a group message that one receiver got and another did not;
- a text that nobody sent, an id that does not grow, a reply that is not OK;
- a server that does not start, or does not end by SIGTERM with 0; a `kurir check` that does not say 0.

A message that was not acknowledged may have come, once, or not.

It prints a line for each round and a summary. Exit code 0: no problems; 1: there were some; 2: wrong arguments. It needs
Python 3.8 and nothing else, and some gigabytes in the directory for temporary files (or `--data`) for ten million
messages. It keeps counters and not the texts, so that its memory does not grow with the number of messages.
"""

import argparse
import array
import bisect
import json
import operator
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

import listening

USERS = ["messi", "henderson", "lineker"]
PASSWORD = "surabaya"
GROUP = "group1"
CONNECTIONS_PER_USER = 2
OK = b'{"status":"OK"}\r\n\r\n'
# To whom the message with each number goes: 0 and 1 are the others, 2 is the group.
PATTERN = [0, 1, 0, 1, 2, 0, 1, 1]
# What stands behind the number in a text. One in a thousand is long.
PADS = ["." * (number * 7 % 61) for number in range(1024)]
PADS[500] = "." * 1500
LINES_AT_ONCE = 512
LINES_AHEAD = 4096
STALL_SECONDS = 60
START_SECONDS = 120
PROBLEMS_SHOWN = 30
SMALL = ["--segment-bytes", "256KiB", "--checkpoint-bytes", "512KiB"]
READINGS = ["all", "nothing", "nothing", "some", "under load"]


class Stop(Exception):
    """It makes no sense to go on."""


class Problems:
    """Counts problems, and prints the first of them."""

    def __init__(self):
        self.count = 0

    def add(self, text):
        self.count += 1
        if self.count <= PROBLEMS_SHOWN:
            print("PROBLEM:", text, flush=True)


class Gap:
    """What one connection had sent and not seen acknowledged when the server was killed."""

    def __init__(self, begin, end):
        self.begin = begin
        self.end = end
        # Receiver: the first number that it should have got and did not.
        self.missing = {}


class Lane:
    """All that one of a user's connections sends, over all lives of the server: numbers from 0."""

    def __init__(self, user, index):
        self.user = user
        self.name = f"{user}.{index}"
        others = [other for other in USERS if other != user]
        self.targets = [(others + [GROUP])[which] for which in PATTERN]
        self.gets = {
            receiver: [target in (receiver, GROUP) for target in self.targets] for receiver in others
        }
        self.steps = {receiver: steps(gets) for receiver, gets in self.gets.items()}
        self.next = {receiver: self.first(receiver, 0) for receiver in others}
        self.sent = 0
        self.acknowledged = 0
        self.lost = 0
        self.gaps = []

    def first(self, receiver, number):
        """The first number from there on that the receiver should get."""
        while not self.gets[receiver][number % len(PATTERN)]:
            number += 1
        return number

    def last_before(self, receiver, number):
        """The last number before that one that the receiver should get."""
        number -= 1
        while not self.gets[receiver][number % len(PATTERN)]:
            number -= 1
        return number

    def killed(self):
        """What is on its way now may or may not be there after the start."""
        if self.acknowledged < self.sent:
            self.gaps.append(Gap(self.acknowledged, self.sent))
            self.lost += self.sent - self.acknowledged
        self.acknowledged = self.sent

    def skip(self, receiver, number, problems):
        """The receiver gets none before that number any more."""
        expected = self.next[receiver]
        while expected < number:
            gap = self.gap(expected)
            if gap is None:
                problems.add(f"{receiver} did not get {self.name} {expected}, which was acknowledged")
                expected = self.first(receiver, expected + 1)
            elif number < gap.end:
                problems.add(f"{receiver} got {self.name} {number}, but not {expected} before it")
                expected = number
            else:
                gap.missing[receiver] = expected
                expected = self.first(receiver, gap.end)
        self.next[receiver] = expected

    def gap(self, number):
        index = bisect.bisect_right([gap.begin for gap in self.gaps], number) - 1
        if index >= 0 and number < self.gaps[index].end:
            return self.gaps[index]
        return None

    def compare(self, problems):
        """Receivers agree on where what was kept of each gap ends."""
        for gap in self.gaps:
            for receiver, missing in gap.missing.items():
                for other in self.gets:
                    last = self.last_before(other, gap.missing.get(other, gap.end))
                    if last >= max(missing, gap.begin):
                        problems.add(f"{other} got {self.name} {last}, but {receiver} did not get {missing}")

    def lines(self, token, count):
        """So many requests more."""
        heads = []
        for target in self.targets:
            verb = "SEND GROUP MESSAGE" if target == GROUP else "SEND MESSAGE"
            heads.append(f"{verb} {token} {target} {self.name} {target} ")
        numbers = range(self.sent, self.sent + count)
        self.sent += count
        period = len(heads)
        return "".join([f"{heads[n % period]}{n} {PADS[n & 1023]}\n" for n in numbers]).encode()


def steps(gets):
    """For each number in the pattern, how far it is to the next that the receiver gets."""
    result = []
    for number in range(len(gets)):
        step = 1
        while not gets[(number + step) % len(gets)]:
            step += 1
        result.append(step)
    return result


class Seen:
    """What was read and may come again: ids that grow, and which message had each."""

    def __init__(self):
        self.ids = array.array("Q")
        self.codes = array.array("Q")

    def add(self, id_, code):
        self.ids.append(id_)
        self.codes.append(code)

    def forget_before(self, id_):
        index = bisect.bisect_left(self.ids, id_)
        self.ids = self.ids[index:]
        self.codes = self.codes[index:]

    def code(self, id_):
        index = bisect.bisect_left(self.ids, id_)
        if index < len(self.ids) and self.ids[index] == id_:
            return self.codes[index]
        return None


class Receiver:
    """Looks at all that one user reads."""

    def __init__(self, user, lanes, problems):
        self.user = user
        self.lanes = {lane.name: (number, lane) for number, lane in enumerate(lanes) if lane.user != user}
        self.count = len(lanes)
        self.problems = problems
        self.last = 0
        self.seen = Seen()
        # What was read since the start of the server: any, any that is new.
        self.any_read = False
        self.new_read = False
        self.again = 0
        self.read = 0

    def killed(self):
        self.any_read = False
        self.new_read = False

    def take(self, reply):
        """One INBOX reply. Says how many messages there are in it."""
        reply = json.loads(reply)
        if reply.get("status") != "OK":
            raise Stop(f"INBOX of {self.user}: {reply}")
        rows = []
        for sender, messages in reply["data"].items():
            rows += messages
            if any(message["nama pengirim"] != sender for message in messages):
                self.problems.add(f"{self.user} has a message in the list of another sender than its own")
        rows.sort(key=operator.itemgetter("id"))
        self.check(rows)
        return len(rows)

    def check(self, rows):
        lanes, user, pads = self.lanes, self.user, PADS
        for row in rows:
            id_, text = row["id"], row["pesan"]
            try:
                name, target, number, pad = text.split(" ", 3)
                number = int(number)
                index, lane = lanes[name]
            except (ValueError, KeyError):
                self.problems.add(f"{user} got a text that nobody sent: {row}")
                continue
            if (
                not 0 <= number < lane.sent
                or target != row["nama penerima"]
                or target != lane.targets[number % len(PATTERN)]
                or pad != pads[number & 1023]
                or row["nama pengirim"] != lane.user
                or not lane.gets[user][number % len(PATTERN)]
            ):
                self.problems.add(f"{user} got what nobody sent: {row}")
                continue
            code = number * self.count + index
            if not self.any_read:
                # What stood before the first that is given after a start was written down as delivered.
                self.any_read = True
                self.seen.forget_before(id_)
            if id_ <= self.last:
                self.came_again(id_, code, text)
                continue
            self.last = id_
            if number != lane.next[user]:
                if number < lane.next[user]:
                    self.problems.add(f"{user} got with the new id {id_} what it had or should have had before: {text[:60]}")
                    continue
                lane.skip(user, number, self.problems)
            lane.next[user] = number + lane.steps[user][number % len(PATTERN)]
            self.seen.add(id_, code)
            self.new_read = True
            self.read += 1

    def came_again(self, id_, code, text):
        if self.new_read:
            self.problems.add(f"{self.user} got id {id_} behind id {self.last}: {text[:60]}")
        elif self.seen.code(id_) != code:
            self.problems.add(f"{self.user} got again, but not as it was, id {id_}: {text[:60]}")
        else:
            self.again += 1


class Server:
    """The program, from its start to its end."""

    def __init__(self, arguments, log):
        self.log = log
        self.process = subprocess.Popen(
            arguments, stdout=subprocess.PIPE, stderr=log, stdin=subprocess.DEVNULL
        )
        self.address = None

    def listen(self):
        """Waits until it takes connections."""
        try:
            self.address = listening.address_of(self.process, START_SECONDS)
        except listening.NotListening as error:
            raise Stop(str(error)) from None

    def connect(self):
        connection = socket.create_connection(self.address, timeout=STALL_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def kill(self):
        self.process.kill()

    def ended(self):
        code = self.process.wait(STALL_SECONDS)
        self.process.stdout.close()
        return code

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        return self.ended()


def ask(connection, line):
    """One request and its reply, as bytes."""
    connection.sendall(line.encode() + b"\n")
    parts = []
    tail = b""
    while not tail.endswith(b"\r\n\r\n"):
        data = connection.recv(1 << 20)
        if not data:
            raise Stop(f"the server closed the connection instead of answering {line[:20]}")
        parts.append(data)
        tail = (tail + data)[-4:]
    return b"".join(parts)


class Sender:
    """A connection that sends, as far ahead as it may."""

    def __init__(self, connection, lane, token):
        self.connection = connection
        self.lane = lane
        self.token = token
        self.waiting = b""
        self.rest = b""

    def half_written(self):
        return bool(self.waiting)

    def outstanding(self):
        return self.lane.acknowledged < self.lane.sent

    def write(self):
        if not self.waiting:
            if self.lane.sent - self.lane.acknowledged > LINES_AHEAD - LINES_AT_ONCE:
                return False
            self.waiting = memoryview(self.lane.lines(self.token, LINES_AT_ONCE))
        sent = self.connection.send(self.waiting)
        self.waiting = self.waiting[sent:]
        return True

    def read(self):
        """Says how many were acknowledged, or None at the end of the connection."""
        data = self.connection.recv(1 << 18)
        if not data:
            return None
        data = self.rest + data
        count = len(data) // len(OK)
        whole = count * len(OK)
        if data[:whole] != OK * count:
            wrong = re.search(rb'\{"status":(?!"OK"\}\r\n\r\n)[^\r]*', data)
            raise Stop(f"{self.lane.name} was answered {(wrong.group() if wrong else data)[:200]!r}")
        self.rest = data[whole:]
        self.lane.acknowledged += count
        if self.lane.acknowledged > self.lane.sent:
            raise Stop(f"{self.lane.name} got more answers than it asked for")
        return count


class Reader:
    """A connection that reads an INBOX, one reply at a time, while others send.

    It has no more than one request on its way, so that the kernel still hands over what the server gave it before it was
    killed.
    """

    def __init__(self, connection, receiver, token, rng):
        self.connection = connection
        self.receiver = receiver
        self.request = f"INBOX {token}\n".encode()
        self.rng = rng
        self.parts = []
        self.asked = False
        self.at = 0.0

    def half_written(self):
        return False

    def outstanding(self):
        return self.asked

    def write(self):
        if self.asked or time.monotonic() < self.at:
            return False
        self.asked = True
        self.connection.send(self.request)
        return True

    def read(self):
        data = self.connection.recv(1 << 20)
        if not data:
            return None
        self.parts.append(data)
        if data.endswith(b"\n") and b"".join(self.parts[-2:]).endswith(b"\r\n\r\n"):
            self.receiver.take(b"".join(self.parts))
            self.parts = []
            self.asked = False
            self.at = time.monotonic() + self.rng.choice([0, 0, 0.05 * self.rng.random()])
        return 0


def turn(worker, more):
    """Writes and reads what goes at once. Says whether it goes on, how many were acknowledged, and whether any byte moved."""
    moved = broken = False
    try:
        if more or worker.half_written():
            moved = worker.write()
    except BlockingIOError:
        pass
    except OSError:
        # What was on its way here is still read.
        broken = True
    try:
        count = worker.read()
    except BlockingIOError:
        return not broken, 0, moved
    except OSError:
        return False, 0, True
    return count is not None, count or 0, True


def load(server, workers, goal, delay, kill):
    """Sends until so many are acknowledged. Then, while it goes on, the server is killed; or it waits for all answers."""
    for worker in workers:
        worker.connection.setblocking(False)
    alive = list(workers)
    timer = threading.Timer(delay, server.kill)
    acknowledged = 0
    reached = False
    stalled = time.monotonic() + STALL_SECONDS
    while alive:
        any_moved = False
        for worker in list(alive):
            goes_on, count, moved = turn(worker, kill or not reached)
            acknowledged += count
            any_moved |= moved
            if not goes_on:
                alive.remove(worker)
        if acknowledged >= goal and not reached:
            reached = True
            if kill:
                timer.start()
        if reached and not kill and not any(worker.outstanding() for worker in alive):
            break
        if any_moved:
            stalled = time.monotonic() + STALL_SECONDS
        elif time.monotonic() > stalled:
            raise Stop(f"nothing moved for {STALL_SECONDS} s")
        else:
            time.sleep(0.0005)
    for worker in workers:
        worker.connection.close()
    if kill and reached:
        timer.join()
    elif len(alive) < len(workers):
        raise Stop("the server closed a connection that it should not have closed")
    return acknowledged


class Run:
    """One data directory, from its first start to the end."""

    def __init__(self, options, data, sizes, rng, problems):
        self.options = options
        self.data = data
        self.rng = rng
        self.problems = problems
        self.lanes = [Lane(user, index) for user in USERS for index in range(CONNECTIONS_PER_USER)]
        self.receivers = {user: Receiver(user, self.lanes, problems) for user in USERS}
        self.tokens = {}
        self.sizes = sizes
        self.log_path = data + ".log"
        self.log = open(self.log_path, "ab")
        self.server = None
        self.kills = 0
        self.acknowledged = 0

    def arguments(self):
        most = str(self.options.messages * 2 + 1_000_000)
        arguments = [self.options.kurir, "serve", "--demo", "--listen", "127.0.0.1:0", "--data", self.data]
        arguments += ["--mailbox-messages-max", most, "--messages-max", str(int(most) * 4)]
        arguments += ["--mailbox-bytes-max", "64GiB", "--sync", self.options.sync, "--log", "info"]
        return arguments + (SMALL if self.sizes == "small" else [])

    def start(self, reading="all"):
        arguments = self.arguments()
        if reading == "under load":
            # Short replies come often, so that kills fall into the middle of them.
            arguments += ["--inbox-messages-max", self.rng.choice(["10", "100", "1000"])]
        self.server = Server(arguments, self.log)
        self.server.listen()

    def killed(self):
        self.server.ended()
        self.kills += 1
        for lane in self.lanes:
            lane.killed()
        for receiver in self.receivers.values():
            receiver.killed()

    def kill_at_start(self):
        """Kills it while it reads its data directory, or just behind that."""
        self.server = Server(self.arguments(), self.log)
        time.sleep(self.rng.choice([0.002, 0.01, 0.05]) * self.rng.random())
        self.server.kill()
        self.killed()
        print(f"{self.sizes:7} kill {self.kills:3}: at the start", flush=True)

    def log_in(self):
        """Once: a token must outlive all kills."""
        with self.server.connect() as connection:
            for user in USERS:
                if user in self.tokens:
                    continue
                reply = json.loads(ask(connection, f"AUTH {user} {PASSWORD}"))
                if reply["status"] != "OK":
                    raise Stop(f"AUTH {user}: {reply}")
                self.tokens[user] = reply["data"]

    def read_inbox(self, user, replies):
        """Reads so many replies, or all that there are, while nobody sends."""
        receiver = self.receivers[user]
        with self.server.connect() as connection:
            for _ in range(replies):
                if receiver.take(ask(connection, f"INBOX {self.tokens[user]}")) == 0:
                    self.complete(user)
                    return

    def complete(self, user):
        """The user has now read all that there is."""
        for lane in self.lanes:
            if lane.user != user:
                lane.skip(user, lane.first(user, lane.sent), self.problems)

    def read_before(self, reading):
        for user in USERS:
            if reading == "all":
                self.read_inbox(user, self.options.messages)
            elif reading == "some" and self.rng.random() < 0.7:
                self.read_inbox(user, self.rng.randint(1, 20))

    def round(self, goal, kill):
        reading = self.rng.choice(READINGS)
        begin = time.monotonic()
        again = self.again()
        self.start(reading)
        started = time.monotonic() - begin
        self.log_in()
        self.read_before(reading)
        workers = [Sender(self.server.connect(), lane, self.tokens[lane.user]) for lane in self.lanes]
        if reading == "under load":
            for user in USERS:
                receiver = self.receivers[user]
                workers.append(Reader(self.server.connect(), receiver, self.tokens[user], self.rng))
        count = load(self.server, workers, goal, self.rng.uniform(0, 0.01), kill)
        self.acknowledged += count
        if kill:
            self.killed()
        print(
            f"{self.sizes:7} kill {self.kills:3}: {count:8,} acknowledged, read: {reading:10}"
            f" again {self.again() - again:6,}  waiting {self.waiting():9,}  start {started:5.2f} s,"
            f" round {time.monotonic() - begin:6.2f} s",
            flush=True,
        )

    def again(self):
        return sum(receiver.again for receiver in self.receivers.values())

    def waiting(self):
        """About how many wait in all mailboxes."""
        count = 0
        for lane in self.lanes:
            for receiver, gets in lane.gets.items():
                count += max(0, lane.sent - lane.next[receiver]) * sum(gets) // len(gets)
        return count

    def check(self):
        result = subprocess.run(
            [self.options.kurir, "check", self.data], capture_output=True, text=True, timeout=600
        )
        if result.returncode != 0:
            output = (result.stdout + result.stderr).strip()
            self.problems.add(f"kurir check says {result.returncode}: {output[-400:]}")

    def rounds(self, messages, kills):
        while self.kills < kills:
            if self.kills + 1 < kills and self.kills > 0 and self.rng.random() < 0.08:
                self.kill_at_start()
                continue
            left = max(0, messages - self.acknowledged)
            share = left / (kills - self.kills)
            # The last one takes what is left.
            factor = 1 if self.kills + 1 == kills else self.rng.uniform(0.2, 1.8)
            self.round(int(share * factor), True)
            if self.rng.random() < 0.05:
                self.check()
        if self.acknowledged < messages:
            self.round(messages - self.acknowledged, False)
            self.stopped()
        self.check()

    def stopped(self):
        code = self.server.stop()
        if code != 0:
            self.problems.add(f"the server ended with exit code {code} at SIGTERM")

    def finish(self):
        """Reads all, and once more after a start."""
        for _ in range(2):
            self.start()
            self.log_in()
            self.read_before("all")
            self.stopped()
            for receiver in self.receivers.values():
                receiver.killed()
        for lane in self.lanes:
            lane.compare(self.problems)
        self.check()

    def look_at_log(self):
        with open(self.log_path, encoding="utf-8", errors="replace") as log:
            for line in log:
                if "panicked" in line:
                    self.problems.add(f"the log says: {line.strip()}")

    def all(self, messages, kills):
        try:
            self.rounds(messages, kills)
            self.finish()
        except (Stop, OSError, ValueError, subprocess.TimeoutExpired) as error:
            self.problems.add(f"{type(error).__name__}: {error}")
        finally:
            if self.server is not None and self.server.process.poll() is None:
                self.server.kill()
                self.server.process.wait(STALL_SECONDS)
            self.log.close()
        self.look_at_log()


def options():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--kurir", required=True, help="the program")
    parser.add_argument("--messages", type=int, default=10_000_000)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--sync", choices=["always", "interval"], default="always")
    parser.add_argument("--sizes", choices=["both", "small", "default"], default="both")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1_000_000))
    parser.add_argument("--data", help="a directory, made for this, that is kept (otherwise a temporary one)")
    return parser.parse_args()


def directory(given):
    if given is None:
        return tempfile.mkdtemp(prefix="kurir-kills-")
    os.makedirs(given)
    return os.path.abspath(given)


def main():
    chosen = options()
    try:
        base = directory(chosen.data)
    except OSError as error:
        print(error, file=sys.stderr)
        return 2
    rng = random.Random(chosen.seed)
    problems = Problems()
    begin = time.monotonic()
    print(f"seed {chosen.seed}, --sync {chosen.sync}", flush=True)
    sizes = ["small", "default"] if chosen.sizes == "both" else [chosen.sizes]
    runs = []
    for number, size in enumerate(sizes):
        run = Run(chosen, os.path.join(base, size), size, rng, problems)
        runs.append(run)
        kills = (chosen.kills + number) // len(sizes)
        run.all(chosen.messages // len(sizes), kills)
    print(
        f"messages acknowledged {sum(run.acknowledged for run in runs):,};"
        f" kills {sum(run.kills for run in runs)};"
        f" not acknowledged at a kill {sum(lane.lost for run in runs for lane in run.lanes):,};"
        f" read {sum(receiver.read for run in runs for receiver in run.receivers.values()):,};"
        f" given again {sum(run.again() for run in runs):,};"
        f" problems {problems.count}; {time.monotonic() - begin:.0f} s"
    )
    if problems.count:
        print(f"what there is stays in {base}; the seed was {chosen.seed}")
    elif chosen.data is None:
        shutil.rmtree(base)
    return 1 if problems.count else 0


if __name__ == "__main__":
    sys.exit(main())

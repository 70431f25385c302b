"""A Kafka client under a test's control: produces lines, consumes them, or is one member of a consumer group, through
kafka-python (pure Python) or confluent-kafka (librdkafka). What it did goes to the files it is told; the last line on
stdout is a JSON summary. It knows nothing of the broker at the other end.

    client.py produce  LIBRARY BOOTSTRAP TOPIC LINES_FILE ACKED_FILE [KEY=VALUE]...
    client.py consume  LIBRARY BOOTSTRAP TOPIC COUNT OUT_FILE [KEY=VALUE]...
    client.py member   LIBRARY BOOTSTRAP TOPIC GROUP OUT_FILE END [KEY=VALUE]...

ACKED_FILE gets one line a record that the broker acknowledged: LINE_NUMBER PARTITION OFFSET.
A member's OUT_FILE gets one line a record it processed, PARTITION OFFSET VALUE, and a line `commit` each time the
broker has accepted a commit of all before it. END says how it ends: `leave:N` after N records, committed and closed;
`die:N` after N records, committed, and then one more batch processed and not committed, by SIGKILL; `idle:S` after S
seconds without a record.
KEY=VALUE are the client's own settings, by the library's own names.
"""

import json
import os
import signal
import sys
import time


def settings(pairs):
    """The library's settings out of KEY=VALUE arguments; numbers and truth values as such."""
    parsed = {}
    for pair in pairs:
        key, _, value = pair.partition("=")
        words = {"true": True, "false": False}
        parsed[key] = words[value] if value in words else int(value) if value.lstrip("-").isdigit() else value
    return parsed


def lines_of(path):
    with open(path, "rb") as file:
        for number, line in enumerate(file):
            yield number, line.rstrip(b"\n")


def say(**summary):
    print(json.dumps(summary), flush=True)


class Confluent:
    """confluent-kafka, that is librdkafka."""

    def __init__(self, bootstrap):
        import confluent_kafka

        self.api = confluent_kafka
        self.bootstrap = bootstrap

    def produce(self, topic, lines, acked, options):
        # A thousand a second is plenty of polls; the queue holds what is in between.
        producer = self.api.Producer({"bootstrap.servers": self.bootstrap, "linger.ms": 5, **options})
        failed = []

        def delivered(number):
            def report(error, message):
                if error is not None:
                    failed.append(f"line {number}: {error}")
                else:
                    acked(number, message.partition(), message.offset())

            return report

        for number, line in lines:
            while True:
                try:
                    producer.produce(topic, value=line, on_delivery=delivered(number))
                    break
                except BufferError:
                    producer.poll(0.05)
            producer.poll(0)
        left = producer.flush(120)
        if left:
            failed.append(f"{left} records without an answer")
        return failed

    def consume(self, topic, count, take, options):
        consumer = self.api.Consumer(
            {
                "bootstrap.servers": self.bootstrap,
                "group.id": f"reader-{os.getpid()}",
                "auto.offset.reset": "earliest",
                "enable.auto.commit": False,
                # The default lets a million small records wait a second for each hundred thousand.
                "queued.min.messages": 1_000_000,
                **options,
            }
        )
        # By assignment, not by group: what is tested here is fetching.
        partitions = consumer.list_topics(topic, timeout=30).topics[topic].partitions
        first = self.api.OFFSET_BEGINNING
        consumer.assign([self.api.TopicPartition(topic, p, first) for p in partitions])
        got = 0
        while got < count:
            batch = consumer.consume(min(10_000, count - got), timeout=30)
            if not batch:
                break
            for message in batch:
                if message.error():
                    raise SystemExit(f"consume: {message.error()}")
                take(message.partition(), message.offset(), message.value())
            got += len(batch)
        consumer.close()

    def member(self, topic, group, options):
        consumer = self.api.Consumer(
            {
                "bootstrap.servers": self.bootstrap,
                "group.id": group,
                "auto.offset.reset": "earliest",
                "enable.auto.commit": False,
                "session.timeout.ms": 6000,
                "heartbeat.interval.ms": 1000,
                **options,
            }
        )
        consumer.subscribe([topic], on_assign=lambda _, given: note_assignment([p.partition for p in given]))

        def poll():
            batch = consumer.consume(500, timeout=0.5)
            for message in batch:
                if message.error():
                    raise SystemExit(f"member: {message.error()}")
            return [(m.partition(), m.offset(), m.value()) for m in batch]

        def commit(positions):
            offsets = [self.api.TopicPartition(topic, p, o) for p, o in positions.items()]
            for done in consumer.commit(offsets=offsets, asynchronous=False):
                if done.error:
                    raise self.api.KafkaException(done.error)

        return poll, commit, consumer.close


class KafkaPython:
    """kafka-python: every byte of the protocol made and read in Python."""

    def __init__(self, bootstrap):
        import kafka

        self.api = kafka
        self.bootstrap = bootstrap

    def produce(self, topic, lines, acked, options):
        options = {"acks": "all", "linger_ms": 5, **options}
        producer = self.api.KafkaProducer(bootstrap_servers=self.bootstrap, **options)
        failed = []
        for number, line in lines:
            future = producer.send(topic, value=line)
            future.add_callback(lambda done, number=number: acked(number, done.partition, done.offset))
            future.add_errback(lambda error, number=number: failed.append(f"line {number}: {error!r}"))
        producer.flush(timeout=120)
        producer.close()
        return failed

    def consume(self, topic, count, take, options):
        consumer = self.api.KafkaConsumer(bootstrap_servers=self.bootstrap, auto_offset_reset="earliest", **options)
        partitions = consumer.partitions_for_topic(topic)
        consumer.assign([self.api.TopicPartition(topic, p) for p in sorted(partitions)])
        consumer.seek_to_beginning()
        got = 0
        while got < count:
            batches = consumer.poll(timeout_ms=30_000)
            if not batches:
                break
            for batch in batches.values():
                for message in batch:
                    take(message.partition, message.offset, message.value)
                got += len(batch)
        consumer.close()

    def member(self, topic, group, options):
        consumer = self.api.KafkaConsumer(
            bootstrap_servers=self.bootstrap,
            group_id=group,
            auto_offset_reset="earliest",
            enable_auto_commit=False,
            session_timeout_ms=6000,
            heartbeat_interval_ms=1000,
            **options,
        )

        class Listener(self.api.ConsumerRebalanceListener):
            def on_partitions_revoked(self, revoked):
                pass

            def on_partitions_assigned(self, given):
                note_assignment([p.partition for p in given])

        consumer.subscribe([topic], listener=Listener())

        def poll():
            batches = consumer.poll(timeout_ms=500)
            return [(m.partition, m.offset, m.value) for batch in batches.values() for m in batch]

        def commit(positions):
            made = self.api.structs.OffsetAndMetadata
            consumer.commit({self.api.TopicPartition(topic, p): made(o, "", -1) for p, o in positions.items()})

        return poll, commit, lambda: consumer.close(autocommit=False)


def note_assignment(partitions):
    # Of its own line: the test waits for it.
    print(f"assigned {sorted(partitions)}", flush=True)


def run_member(client, topic, group, path, end, options):
    how, _, number = end.partition(":")
    limit = float(number)
    poll, commit, close = client.member(topic, group, options)
    processed = 0
    heard = time.monotonic()
    with open(path, "w", encoding="utf-8") as out:
        while True:
            records = poll()
            positions = {}
            for partition, offset, value in records:
                out.write(f"{partition} {offset} {value.decode()}\n")
                positions[partition] = offset + 1
            out.flush()
            if records:
                heard = time.monotonic()
                if how == "die" and processed >= limit:
                    os.kill(os.getpid(), signal.SIGKILL)
                commit(positions)
                processed += len(records)
                out.write("commit\n")
                out.flush()
            if how == "leave" and processed >= limit:
                break
            if how == "idle" and time.monotonic() - heard > limit:
                break
    close()
    say(processed=processed)


def main():
    action, library, bootstrap, topic, *rest = sys.argv[1:]
    client = {"confluent": Confluent, "kafka-python": KafkaPython}[library](bootstrap)
    if action == "produce":
        path, acked_path, *pairs = rest
        count = 0
        with open(acked_path, "w", encoding="ascii", buffering=1 << 16) as file:

            def acked(number, partition, offset):
                nonlocal count
                file.write(f"{number} {partition} {offset}\n")
                count += 1
                if count % 1000 == 0:
                    print(f"acked {count}", flush=True)

            failed = client.produce(topic, lines_of(path), acked, settings(pairs))
        say(acked=count, failed=len(failed), first_failure=failed[0] if failed else None)
        sys.exit(1 if failed else 0)
    if action == "consume":
        count, path, *pairs = rest
        got = 0
        with open(path, "wb") as file:

            def take(partition, offset, value):
                nonlocal got
                file.write(b"%d %d %s\n" % (partition, offset, value))
                got += 1

            client.consume(topic, int(count), take, settings(pairs))
        say(consumed=got)
        sys.exit(0 if got == int(count) else 1)
    if action == "member":
        group, path, end, *pairs = rest
        run_member(client, topic, group, path, end, settings(pairs))
        return
    sys.exit(f"unknown action {action}")


main()

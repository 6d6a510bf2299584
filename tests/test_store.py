"""The contract of a store, for each of them: one log and one registry, however many processes share them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest
from expected import UUID7
from members import SHORT_LEASE, SOMETHING, Member, Process, audience, members, on_loop, registration, threads_left

import store_sqlite_transaction
from errors import ConnectionRefused, KeyReused
from store import ClientIdTaken, Draft, Once, Record, Report

# The log.


@on_loop
async def test_an_empty_log_has_a_position(any_store: str) -> None:
    """It is the one that a client is given, so that it may resume there."""
    async with members(any_store) as [one]:
        assert one.opening.before == UUID7
        assert await one.admit("a") == one.opening.before
        assert one.opening.records == []
        assert abs(one.opening.started_at - time.time()) < 5
        assert 0 <= one.opening.age < 5


@on_loop
async def test_an_appended_notification_is_delivered(any_store: str) -> None:
    """To the process that appended it, whole and before it has the receipt."""
    async with members(any_store) as [one]:
        drafts = [
            SOMETHING,
            Draft(b',"x":"\xc3\xa9"}', audience(["a", "b"], ["news"]), False),
            Draft(b"}", audience()),
        ]
        appended = await one.store.append(drafts)
        expected = [
            Record(receipt.id, *draft, appended.at, receipt.recipients)
            for receipt, draft in zip(appended.receipts, drafts, strict=True)
        ]
        assert one.records == expected
        assert abs(appended.at - time.time()) < 5
        assert not appended.repeated


@on_loop
async def test_ids_increase(any_store: str) -> None:
    async with members(any_store) as [one]:
        await one.publish(*[SOMETHING] * 50)
        for _ in range(50):
            await one.publish()
        ids = [one.opening.before, *one.ids]
        assert ids == sorted(set(ids))
        assert all(id == UUID7 for id in ids)


@on_loop
async def test_ids_increase_over_all_processes_while_the_clock_jumps(
    shared: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An hour back, and forth again."""
    async with members(shared, 2) as [one, other]:
        await one.publish()
        with monkeypatch.context() as patch:
            now, now_ns = time.time(), time.time_ns()
            patch.setattr(time, "time", lambda: now - 3600)
            patch.setattr(time, "time_ns", lambda: now_ns - 3600 * 10**9)
            await other.publish()
            await one.publish()
        await other.publish()
        await one.until(lambda: len(one.ids) == 4)
        assert one.ids == sorted(set(one.ids))
        assert one.opening.before < one.ids[0]


@on_loop
async def test_every_process_gets_everything_in_one_order(shared: str) -> None:
    """Every process appends at once, and all see one order."""
    async with members(shared, 3) as everyone:
        ids = await asyncio.gather(*(member.publish() for _ in range(100) for member in everyone))
        for member in everyone:
            await member.until(lambda member=member: len(member.records) >= 300)
            assert member.ids == sorted(ids)
        assert everyone[0].records == everyone[1].records == everyone[2].records


@on_loop
async def test_a_batch_stays_together(shared: str) -> None:
    """Nothing comes between its notifications."""
    async with members(shared, 2) as [one, other]:
        batches = [one.store.append([SOMETHING] * 10), other.store.append([SOMETHING] * 10)]
        appended = await asyncio.gather(*batches, *(member.publish() for member in (one, other) for _ in range(10)))
        await one.until(lambda: len(one.records) == 40)
        for batch in appended[:2]:
            ids = [receipt.id for receipt in batch.receipts]
            first = one.ids.index(ids[0])
            assert one.ids[first : first + 10] == ids


@on_loop
async def test_a_process_finds_the_log_as_it_is(shared: str) -> None:
    """The opening has the records so far, and later ones are delivered."""
    async with members(shared) as [one]:
        await one.publish(Draft(b'"1"}', audience(["a"], ["t", "u"])), Draft(b'"2"}', audience(), False))
        async with members(shared) as [late]:
            assert late.opening.records == one.records
            assert late.opening.before == one.opening.before
            assert late.opening.started_at == one.opening.started_at
            assert late.opening.age > 0
            newest = await one.publish()
            await late.until(lambda: late.ids == [newest])


@on_loop
async def test_a_wake_up_takes_milliseconds(shared: str) -> None:
    """A record arrives well before the second after which a process looks by itself."""
    async with members(shared, 2) as [one, other]:
        times = []
        for count in range(1, 51):
            began = time.monotonic()
            await one.publish()
            await other.until(lambda count=count: len(other.records) == count)
            times.append(time.monotonic() - began)
        assert sorted(times)[25] < 0.1


# Its bounds.


@on_loop
async def test_the_log_keeps_as_many_as_are_replayed(shared: str) -> None:
    """The log keeps the newest; only replayable records count. The id before the first is known."""
    async with members(shared, history_size=3) as [one]:
        for number in range(6):
            await one.publish(Draft(b"%d}" % number), Draft(b"{}", None, False))
        ids = one.ids
    async with members(shared, history_size=3) as [late]:
        assert [record.rest for record in late.opening.records] == [b"{}", b"3}", b"{}", b"4}", b"{}", b"5}", b"{}"]
        assert late.opening.before == ids[4]


@on_loop
async def test_the_log_is_bounded_in_bytes(shared: str) -> None:
    """The names in an audience count."""
    async with members(shared, history_bytes=100) as [one]:
        for number in range(5):
            await one.publish(Draft(b"%d" % number * 30, audience(["c" * 10], ["t" * 10])))
    async with members(shared, history_bytes=100) as [late]:
        assert [record.rest[:1] for record in late.opening.records] == [b"3", b"4"]


@on_loop
async def test_the_log_is_bounded_in_age(shared: str) -> None:
    """Where nothing is left, the position is still known."""
    async with members(shared, history_ttl=0.1) as [one]:
        newest = await one.publish()
        await asyncio.sleep(0.15)
    async with members(shared, history_ttl=0.1) as [late]:
        assert late.opening.records == []
        assert late.opening.before == newest
        assert await late.admit("a") == newest


@pytest.mark.usefixtures("_short_leases")
@on_loop
async def test_bounds_hold_while_nobody_appends_and_none_joins(shared: str) -> None:
    """A record that is too old goes by itself: one that joins with a longer memory does not find it."""
    async with members(shared, history_ttl=0.1) as [one]:
        newest = await one.publish()

        async def is_forgotten() -> bool:
            async with members(shared) as [late]:
                return (late.opening.records, late.opening.before) == ([], newest)

        await one.eventually(is_forgotten)


# Recipients.


@on_loop
async def test_recipients_of_everyone(any_store: str) -> None:
    async with members(any_store) as [one]:
        for client_id in ("a", "b", "c"):
            await one.admit(client_id)
        one.leave("b")
        assert (await one.store.append([SOMETHING])).receipts[0].recipients == 2


@on_loop
async def test_recipients_on_all_processes(shared: str) -> None:
    """Clients by id, by topic and by user, each once, those that are connected."""
    async with members(shared, 3) as [one, other, third]:
        await one.admit("a", "t", user="ann")
        await one.admit("b", "t", "u")
        await other.admit("c", "u", user="ann")
        await third.admit("d", user="t")
        drafts = {
            Draft(b"{}"): 4,
            Draft(b"{}", audience()): 0,
            Draft(b"{}", audience(["a", "d", "nobody"])): 2,
            Draft(b"{}", audience([], ["t"])): 2,
            Draft(b"{}", audience([], ["nothing"])): 0,
            Draft(b"{}", audience([], ["t", "u"])): 3,
            Draft(b"{}", audience(["a", "d"], ["t"])): 3,
            Draft(b"{}", audience([], [], ["ann"])): 2,
            Draft(b"{}", audience([], [], ["ann", "t", "nobody"])): 3,
            Draft(b"{}", audience(["a", "nobody"], ["u"], ["ann", "t"])): 4,
        }
        for member in (one, other):
            appended = await member.store.append(list(drafts))
            assert [receipt.recipients for receipt in appended.receipts] == list(drafts.values())


@on_loop
async def test_a_notification_for_nobody_reaches_every_process(shared: str) -> None:
    """It is a place in the log that all of them know."""
    async with members(shared, 2) as [one, other]:
        await one.admit("a", "t")
        (receipt,) = (await one.store.append([Draft(b"{}", audience(), False)])).receipts
        await other.until(lambda: other.ids == one.ids == [receipt.id])
        assert receipt.recipients == 0
        assert one.records[0].audience == other.records[0].audience == audience()


@on_loop
async def test_topics_may_change(shared: str) -> None:
    """A change is answered with the newest id and replaces all topics; a client that leaves has none."""
    async with members(shared, 2) as [one, other]:

        async def subscribers(topic: str) -> int:
            return (await other.store.append([Draft(b"{}", audience([], [topic]))])).receipts[0].recipients

        await one.admit("a", "t", "u")
        newest = await other.publish()
        assert await one.store.subscribe(registration("a", "u", "v")) == newest
        assert [await subscribers(topic) for topic in "tuv"] == [0, 1, 1]
        await one.store.subscribe(registration("a"))
        assert [await subscribers(topic) for topic in "tuv"] == [0, 0, 0]
        await one.store.subscribe(registration("a", "t"))
        one.leave("a")
        await one.active()
        assert await subscribers("t") == 0


@on_loop
async def test_a_client_that_is_gone_subscribes_to_nothing(shared: str) -> None:
    """A process subscribes neither a client of another process nor one of none."""
    async with members(shared, 2) as [one, other]:
        await other.admit("a")
        await one.store.subscribe(registration("a", "t"))
        await one.store.subscribe(registration("b", "t"))
        assert (await one.store.append([Draft(b"{}", audience([], ["t"]))])).receipts[0].recipients == 0


@on_loop
async def test_an_admission_falls_between_two_notifications(shared: str) -> None:
    """The notification with the returned id has not counted the client, the next one has."""
    async with members(shared, 2) as [one, other]:
        publishes = [asyncio.create_task(other.store.append([SOMETHING])) for _ in range(50)]
        admissions = [asyncio.create_task(one.admit(str(number))) for number in range(50)]
        recipients = {(await publish).receipts[0].id: (await publish).receipts[0].recipients for publish in publishes}
        newest = [await admission for admission in admissions]
        for id, count in recipients.items():
            assert count == sum(position < id for position in newest)


@on_loop
async def test_an_answer_comes_after_the_log_up_to_it(shared: str) -> None:
    """A process that is told an id has been told the notification before."""
    async with members(shared, 2) as [one, other]:
        publishes = [asyncio.create_task(other.store.append([SOMETHING])) for _ in range(50)]
        for number in range(50):
            newest = await (one.admit(str(number)) if number % 2 else one.store.subscribe(registration("0")))
            assert newest in (one.opening.before, *one.ids)
        await asyncio.gather(*publishes)


# Admission.


@on_loop
async def test_a_client_id_is_taken_once(shared: str) -> None:
    """The refused process is told the owner, and the attempt is not counted."""
    async with members(shared, 2) as [one, other]:
        await one.admit("a")
        with pytest.raises(ClientIdTaken) as refusal:
            await other.admit("a")
        assert refusal.value.node == one.store.node_id
        census = await other.store.census()
        assert (census.active, census.total) == (1, 1)


@on_loop
async def test_of_a_hundred_claims_one_wins(shared: str) -> None:
    async with members(shared, 2) as both:
        one, other = both
        claims = [member.admit("a") for _ in range(50) for member in both]
        results = await asyncio.gather(*claims, return_exceptions=True)
        winners = {index % 2 for index, result in enumerate(results) if isinstance(result, str)}
        assert len(winners) == 1  # A process may claim its own client_ids again.
        assert all(isinstance(result, str | ClientIdTaken) for result in results)
        assert await one.active() == await other.active() == 1


@on_loop
async def test_a_process_may_claim_its_own_client_ids_again(shared: str) -> None:
    """The Hub knows its own clients; it takes no second slot, and counts as a connection."""
    async with members(shared, max_connections=1) as [one]:
        await one.admit("a", "t")
        await one.admit("a", "u")
        census = await one.store.census()
        assert (census.active, census.total) == (1, 2)
        drafts = [Draft(b"{}", audience([], [topic])) for topic in "tu"]
        assert [receipt.recipients for receipt in (await one.store.append(drafts)).receipts] == [0, 1]


@on_loop
async def test_a_client_that_left_may_be_admitted_elsewhere(shared: str) -> None:
    """Another process admits it once this one has done anything later: a process's operations keep their order."""
    async with members(shared, 2) as [one, other]:
        await one.admit("a")
        one.leave("a")
        await one.publish()
        await other.admit("a")


@on_loop
async def test_a_client_that_leaves_and_comes_back_at_once_stays(shared: str) -> None:
    """A client that is taken out is not the one that is admitted after it."""
    async with members(shared, 2) as [one, other]:
        await one.admit("a")
        one.leave("a")
        await one.admit("a")
        assert await one.active() == 1
        with pytest.raises(ClientIdTaken):
            await other.admit("a")


@on_loop
async def test_a_process_takes_out_its_own_clients_only(shared: str) -> None:
    async with members(shared, 2) as [one, other]:
        await one.admit("a")
        other.store.leave("a")
        await other.publish()
        assert await one.active() == 1


@on_loop
async def test_the_limit_holds_over_all_processes(shared: str) -> None:
    async with members(shared, 2, max_connections=10) as both:
        admissions = (member.admit(f"{index}{number}") for index, member in enumerate(both) for number in range(8))
        results = await asyncio.gather(*admissions, return_exceptions=True)
        refusals = {str(result) for result in results if isinstance(result, ConnectionRefused)}
        assert refusals == {"Connection limit exceeded: 10/10"}
        census = await both[0].store.census()
        assert (census.active, census.total) == (10, 10)


@on_loop
async def test_a_taken_id_comes_before_the_limit(shared: str) -> None:
    async with members(shared, 2, max_connections=1) as [one, other]:
        await one.admit("a")
        with pytest.raises(ClientIdTaken):
            await other.admit("a")
        with pytest.raises(ConnectionRefused):
            await other.admit("b")


@on_loop
async def test_a_closed_process_has_no_clients(shared: str) -> None:
    """Messages posted, and departures, before the close are still done."""
    async with members(shared, 2) as [one, other]:
        going = await Member(shared).open()
        await going.admit("a", "t")
        await going.admit("b")
        post = asyncio.create_task(going.store.post(one.store.node_id, b"bye"))
        await asyncio.sleep(0)
        going.leave("a")
        await going.store.close()
        await post
        await one.until(lambda: one.mail == [(going.store.node_id, b"bye")])
        await other.admit("a")
        await other.admit("b")
        assert await one.active() == 2


# Idempotency keys.


@on_loop
async def test_a_repeat_gets_the_first_receipts(any_store: str) -> None:
    """Nothing is appended, and nothing is counted."""
    async with members(any_store) as [one]:
        first = await one.store.append([SOMETHING] * 2, Once("key", b"request"))
        again = await one.store.append([SOMETHING] * 2, Once("key", b"request"))
        assert again == first._replace(repeated=True)
        assert len(one.records) == 2
        assert (await one.store.census()).notifications_sent == 2


@on_loop
async def test_a_key_is_looked_for_without_drafts(any_store: str) -> None:
    """An unknown key has no receipts and stays free; a known one has those of its first request."""
    async with members(any_store) as [one]:
        assert not (await one.store.append([], Once("key", b"request"))).receipts
        first = await one.store.append([SOMETHING], Once("key", b"request"))
        assert not first.repeated
        assert await one.store.append([], Once("key", b"request")) == first._replace(repeated=True)


@on_loop
async def test_a_repeat_gets_them_on_every_process(shared: str) -> None:
    """Of repeats at the same time, one is the first; all have the same receipts."""
    async with members(shared, 2) as [one, other]:
        requests = (member.store.append([SOMETHING], Once("key", b"r")) for _ in range(5) for member in (one, other))
        appended = await asyncio.gather(*requests)
        assert sum(not answer.repeated for answer in appended) == 1
        assert len({answer.receipts[0] for answer in appended}) == len({answer.at for answer in appended}) == 1


@on_loop
async def test_a_key_belongs_to_its_request(any_store: str) -> None:
    async with members(any_store) as [one]:
        await one.store.append([SOMETHING], Once("key", b"request"))
        with pytest.raises(KeyReused):
            await one.store.append([SOMETHING], Once("key", b"another"))
        assert len(one.records) == 1


@on_loop
async def test_a_key_is_forgotten_with_the_history(any_store: str) -> None:
    """By its age."""
    async with members(any_store, history_ttl=2) as [one]:
        await one.store.append([SOMETHING], Once("key", b"request"))
        await asyncio.sleep(2.05)
        assert not (await one.store.append([SOMETHING], Once("key", b"another"))).repeated
        assert (await one.store.append([SOMETHING], Once("key", b"another"))).repeated


@on_loop
async def test_as_many_keys_are_kept_as_notifications(any_store: str) -> None:
    async with members(any_store, history_size=3) as [one]:
        for number in range(4):
            await one.store.append([SOMETHING], Once(str(number), b"r"))
        assert not (await one.store.append([SOMETHING], Once("0", b"r"))).repeated
        assert (await one.store.append([SOMETHING], Once("3", b"r"))).repeated


# Counters.


@on_loop
async def test_every_process_counts_the_same(shared: str) -> None:
    async with members(shared, 2) as [one, other]:
        await one.admit("a")
        await other.admit("b")
        other.leave("b")
        await one.publish(*[SOMETHING] * 3)
        await other.publish()
        await one.store.report(Report(10, 1))
        await other.store.report(Report(2, 0))
        await other.store.report(Report(5, 0))
        assert await one.store.census() == (1, 2, 4, 15, 1, [other.store.node_id])
        assert await other.store.census() == (1, 2, 4, 15, 1, [one.store.node_id])


@on_loop
async def test_counters_keep_the_part_of_a_closed_process(shared: str) -> None:
    async with members(shared) as [one]:
        async with members(shared) as [going]:
            await going.admit("a")
            await going.publish()
            await going.store.report(Report(7, 2))
        assert await one.store.census() == (0, 1, 1, 7, 2, [])


@on_loop
async def test_counters_begin_again_when_nobody_is_left(shared: str) -> None:
    """The history stays, and so do the keys."""
    async with members(shared) as [one]:
        await one.admit("a")
        await one.store.append([SOMETHING], Once("key", b"r"))
        await one.store.report(Report(7, 2))
        assert await one.store.lead() == 0
        await one.store.append([SOMETHING], None, 1)
    async with members(shared) as [late]:
        assert await late.store.census() == (0, 0, 0, 0, 0, [])
        assert late.opening.started_at > one.opening.started_at
        assert late.opening.age < 1
        assert await late.store.lead() == 0
        assert late.opening.records == one.records
        assert (await late.store.append([SOMETHING], Once("key", b"r"))).repeated


# The one that sends test notifications.


@on_loop
async def test_one_process_leads(shared: str) -> None:
    """The first that asks; the other one when it is gone, with the number that was reached."""
    async with members(shared) as [other]:
        async with members(shared) as [one]:
            assert await one.store.lead() == 0
            assert await other.store.lead() is None
            assert await one.store.lead() == 0
            await one.store.append([SOMETHING], None, 1)
            assert await one.store.lead() == 1
        assert await other.store.lead() == 1


@on_loop
async def test_a_test_notification_is_appended_once(shared: str) -> None:
    """A process that does not lead appends none, and a number other than the next appends none."""
    async with members(shared, 2) as [one, other]:
        assert (await one.store.append([SOMETHING], None, 1)).receipts == []
        await one.store.lead()
        assert (await other.store.append([SOMETHING], None, 1)).receipts == []
        assert (await one.store.append([SOMETHING], None, 2)).receipts == []
        assert len((await one.store.append([SOMETHING], None, 1)).receipts) == 1
        assert (await one.store.append([SOMETHING], None, 1)).receipts == []
        assert (await one.store.census()).notifications_sent == len(one.records) == 1


@pytest.mark.usefixtures("_short_leases")
@on_loop
async def test_a_process_that_stops_asking_loses_the_lead(shared: str) -> None:
    """A draining process sends no test notifications; a late attempt is not appended."""
    async with members(shared, 2) as [one, other]:
        await one.store.lead()

        async def leads() -> bool:
            return await other.store.lead() == 0

        await other.eventually(leads)
        assert (await one.store.append([SOMETHING], None, 1)).receipts == []


# Messages between nodes.


@on_loop
async def test_messages_arrive_in_order(shared: str) -> None:
    async with members(shared, 3) as [one, other, third]:
        for number in range(20):
            await one.store.post(other.store.node_id, b"%d" % number)
            await third.store.post(other.store.node_id, b"%d" % number)
        await other.until(lambda: len(other.mail) == 40)
        for sender in (one, third):
            received = [message for node, message in other.mail if node == sender.store.node_id]
            assert received == [b"%d" % number for number in range(20)]
        assert one.mail == third.mail == []


@on_loop
async def test_a_message_takes_milliseconds(shared: str) -> None:
    async with members(shared, 2) as [one, other]:
        times = []
        for count in range(1, 21):
            began = time.monotonic()
            await one.store.post(other.store.node_id, b"probe")
            await other.until(lambda count=count: len(other.mail) == count)
            times.append(time.monotonic() - began)
        assert sorted(times)[10] < 0.1


@on_loop
async def test_a_message_to_nobody_is_lost(any_store: str) -> None:
    async with members(any_store) as [one]:
        await one.store.post("nobody", b"hello")


# Processes that die.


@pytest.mark.usefixtures("_short_leases")
@on_loop
async def test_a_killed_process_leaves_its_ids_slots_and_figures(
    shared: str, start_process: Callable[..., Process]
) -> None:
    """Its acknowledged notifications are there; its clients go with its lease."""
    process = start_process(shared, SHORT_LEASE)
    async with members(shared, max_connections=2) as [one]:
        process.ask("member.admit('a', 't')")
        process.ask("member.admit('b')")
        process.ask("member.store.report(Report(5, 1))")
        ids = [process.ask("member.publish()") for _ in range(5)]
        process.kill()
        assert await one.active() == 2
        with pytest.raises(ClientIdTaken):
            await one.admit("a")

        async def is_free() -> bool:
            return await one.active() == 0

        await one.eventually(is_free)
        await one.admit("a")
        await one.admit("c")
        assert one.ids == ids
        assert await one.store.census() == (2, 4, 5, 5, 1, [])
        assert (await one.store.append([Draft(b"{}", audience([], ["t"]))])).receipts[0].recipients == 0


@pytest.mark.usefixtures("_short_leases")
@on_loop
async def test_the_lead_of_a_killed_process_is_taken_over(shared: str, start_process: Callable[..., Process]) -> None:
    process = start_process(shared, SHORT_LEASE)
    async with members(shared) as [one]:
        process.ask("member.store.lead()")
        process.ask("member.store.append([SOMETHING], None, 1)")
        process.kill()

        async def leads() -> bool:
            return await one.store.lead() == 1

        await one.eventually(leads)
        assert len((await one.store.append([SOMETHING], None, 2)).receipts) == 1


@pytest.mark.usefixtures("_short_leases")
@on_loop
async def test_a_process_that_was_taken_for_dead_joins_again(
    shared: str, start_process: Callable[..., Process]
) -> None:
    """It brings all clients but those taken by others meanwhile, and gets its missed notifications once."""
    process = start_process(shared, SHORT_LEASE)
    async with members(shared) as [one]:
        for client_id in ("a", "b"):
            process.ask(f"member.admit('{client_id}', 't')")
        before = await one.publish()
        process.ask("member.until(lambda: len(member.records) == 1)")
        process.stop()

        async def is_gone() -> bool:
            return await one.active() == 0

        await one.eventually(is_gone)
        await one.admit("a")
        ids = [before, *[await one.publish() for _ in range(3)]]
        process.go_on()
        process.ask("member.until(lambda: member.lost_clients)")
        assert process.ask("member.lost_clients") == ["a"]
        # Redis's store registers its clients again before it reads the log.
        process.ask(f"member.until(lambda: len(member.records) == {len(ids)})")
        assert process.ask("member.ids") == ids
        assert await one.active() == 2
        assert (await one.store.append([Draft(b"{}", audience([], ["t"]))])).receipts[0].recipients == 1
        await one.store.post((await one.store.census()).others[0], b"hello")
        process.ask("member.until(lambda: member.mail)")


@pytest.mark.usefixtures("_short_leases")
@on_loop
async def test_a_process_that_was_taken_for_dead_counts_on(shared: str, start_process: Callable[..., Process]) -> None:
    """Its counts are in the sums once, while it is gone and when it is back."""
    process = start_process(shared, SHORT_LEASE)
    async with members(shared) as [one]:
        process.ask("member.store.report(Report(7, 2))")
        process.stop()

        async def is_dead() -> bool:
            return not (await one.store.census()).others

        await one.eventually(is_dead)
        assert (await one.store.census())[3:] == (7, 2, [])
        process.go_on()
        process.ask("member.store.report(Report(8, 2))")
        assert (await one.store.census())[3:5] == (8, 2)


@on_loop
async def test_a_store_that_is_opened_again_counts_on(shared: str) -> None:
    """A Hub that was stopped and is started again continues its counters."""
    async with members(shared, 2) as [one, other]:
        await one.store.report(Report(7, 2))
        await one.store.close()
        await one.open()
        await one.store.report(Report(8, 2))
        assert (await other.store.census())[3:5] == (8, 2)


def test_a_loop_that_went_away_is_followed_by_another(shared: str) -> None:
    """Records from in between are then delivered, and nothing is left of the store's first loop."""
    member = Member(shared)
    asyncio.run(member.open())

    async def meanwhile() -> None:
        async with members(shared) as [other]:
            await other.publish()

    async def again() -> None:
        await member.open()
        await member.until(lambda: member.records)
        await member.publish()
        await member.store.close()

    asyncio.run(meanwhile())
    asyncio.run(again())
    assert (len(member.records), member.times_missed, threads_left()) == (2, 0, [])


@on_loop
async def test_a_store_that_is_closed_while_it_counts_counts_on(shared: str) -> None:
    """Its last report is in the sums once."""
    async with members(shared, 2) as [one, other]:
        report = asyncio.create_task(one.store.report(Report(7, 2)))
        await asyncio.sleep(0)
        await one.store.close()
        await report
        await one.open()
        await one.store.report(Report(8, 2))
        assert (await other.store.census())[3:5] == (8, 2)


@pytest.mark.usefixtures("_short_leases")
@on_loop
async def test_a_store_that_is_opened_again_has_missed_nothing(shared: str) -> None:
    """That holds although all later notifications have left the log for their age."""
    async with members(shared, 2, history_ttl=SHORT_LEASE / 2) as [one, other]:
        await one.publish()
        await one.store.close()
        await asyncio.sleep(SHORT_LEASE)
        newest = await other.publish()
        await one.open()
        await one.until(lambda: one.ids[-1:] == [newest])
        assert (len(one.ids), one.times_missed) == (2, 0)


@pytest.mark.usefixtures("_short_leases")
@on_loop
async def test_a_process_hears_that_it_missed_something(shared: str, start_process: Callable[..., Process]) -> None:
    """The log waits for no process that was taken for dead; from where it begins, all is delivered."""
    process = start_process(shared, SHORT_LEASE)
    async with members(shared, history_size=3) as [one]:
        process.stop()

        async def is_dead() -> bool:
            return not (await one.store.census()).others

        await one.eventually(is_dead)
        # A read that it had begun may still be answered, until it ends by itself.
        await asyncio.sleep(SHORT_LEASE)
        await one.publish(*[SOMETHING] * 200)
        # A store may trim with the next renewal only, when all live processes have read the entries to trim.
        await asyncio.sleep(SHORT_LEASE / 2)
        process.go_on()
        process.ask("member.until(lambda: member.records)")
        assert process.ask("member.times_missed") == 1
        assert process.ask("member.ids") == one.ids[-3:]


@on_loop
async def test_appended_notifications_survive_every_process(shared: str, start_process: Callable[..., Process]) -> None:
    """Killed in the middle of appending: everything that was answered is there, once and in order."""
    processes = [start_process(shared), start_process(shared)]
    for process in processes:
        process.begin("member.publish_for_ever()")
    answered = [process.answered(200) for process in processes]
    for process in processes:
        process.kill()
    async with members(shared) as [late]:
        ids = [record.id for record in late.opening.records]
        assert ids == sorted(set(ids))
        for published in answered:
            assert [id for id in ids if id in set(published)] == published


@on_loop
async def test_processes_together_deliver_everything_once(shared: str, start_process: Callable[..., Process]) -> None:
    """Two of them append at full speed while a third only reads; all have the same in the end."""
    processes = [start_process(shared), start_process(shared)]
    async with members(shared) as [reader]:
        for process in processes:
            process.begin("asyncio.gather(*(member.publish() for _ in range(500)))")
        ids = sorted(id for process in processes for id in process.result())
        await reader.until(lambda: len(reader.records) == 1000)
        assert reader.ids == ids
        for process in processes:
            process.ask("member.until(lambda: len(member.records) == 1000)")
            assert process.ask("member.ids") == ids


# Revocations.


@on_loop
async def test_every_process_reads_all_revocations_once(shared: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pages, and from a place on the later ones, those of another process too."""
    monkeypatch.setattr(store_sqlite_transaction, "REVOCATIONS_AT_ONCE", 1000)

    async def read(member: Member, place: str = "") -> tuple[str, dict[str, int]]:
        there: dict[str, int] = {}
        while (page := await member.store.revocations(place))[1]:
            place, found = page
            there |= found
        return place, there

    async with members(shared, 2) as [one, other]:
        at = await one.store.revoke("ann")
        assert abs(at - time.time()) < 5
        place, there = await read(other)
        assert there == {"ann": at}
        many = {f"user {number}": at for number in range(1500)}
        await asyncio.gather(*(one.store.revoke(user, second) for user, second in many.items()))
        assert await one.store.revoke("ann", at - 1) == at - 1
        assert (await read(other, place))[1] == many
        assert await one.store.revoke("ann", at + 1) == at + 1
        async with members(shared) as [late]:
            place, there = await read(late)
            assert there == many | {"ann": at + 1}
            assert await read(late, place) == (place, {})
            assert (await read(late, "another log/5"))[1] == there


@on_loop
async def test_revocations_are_forgotten_in_time(shared: str) -> None:
    async with members(shared, revocation_ttl=2) as [one]:
        at = await one.store.revoke("ann")
        await one.store.revoke("bob", at - 100)

        async def are_forgotten() -> bool:
            return (await one.store.revocations(""))[1] == {}

        await one.eventually(are_forgotten)

// What a blob has, whatever the order in which its bytes come, are written and are read back: the
// hash comes out right, and no byte counts twice.
import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { test } from "node:test";
import { internals } from "../imgpull.ts";

const { BlobState, EarlyRoom } = internals;
type Blob = InstanceType<typeof BlobState>;
type EarlyRoom = InstanceType<typeof internals.EarlyRoom>;
type Registry = ConstructorParameters<typeof BlobState>[1];

const registry = { acceptsRanges: true, origin: "http://registry" } as unknown as Registry;

/** Numbers that look random, and are the same each time. */
function numbersFrom(seed: number): (below: number) => number {
  let state = seed;
  return (below) => {
    state = (Math.imul(state, 1103515245) + 12345) & 0x7fffffff;
    return (state >> 8) % below;
  };
}

class SmallRoom extends EarlyRoom {
  leftBytes: number;
  constructor(leftBytes: number) {
    super();
    this.leftBytes = leftBytes;
  }
  override take(sizeBytes: number): boolean {
    if (sizeBytes > this.leftBytes) return false;
    this.leftBytes -= sizeBytes;
    return true;
  }
  override giveBack(sizeBytes: number): void {
    this.leftBytes += sizeBytes;
  }
}

/** Hashes a piece of what is in place and was not hashed as it came; false where there is none. */
function readBack(blob: Blob, bytes: Buffer, room: SmallRoom): boolean {
  const range = blob.toReadBack();
  if (!range) return false;
  blob.hashInOrder(range[0], bytes.subarray(...range), room);
  return true;
}

test("bytes in any order, over several fronts, are hashed and counted once", () => {
  const below = numbersFrom(1);
  for (let round = 0; round < 500; round += 1) {
    const size = 1 + below(4000);
    const bytes = Buffer.from(Array.from({ length: size }, () => below(256)));
    const digest = `sha256:${createHash("sha256").update(bytes).digest("hex")}`;
    const room = new SmallRoom(below(2000));
    const roomBytes = room.leftBytes;
    const blob = new BlobState({ mediaType: "", digest, size }, registry, 0, []);
    const resumed = below(3) === 0 ? below(size) : 0;
    if (resumed > 0) blob.resume([[0, resumed]]);

    const fronts: [at: number, to: number][] = [];
    for (let at = resumed; at < size; ) {
      const to = Math.min(size, at + 1 + below(1500));
      fronts.push([at, to]);
      at = to;
    }
    const unwritten: [position: number, sizeBytes: number][] = [];
    while (fronts.length + unwritten.length > 0) {
      const front = fronts[below(Math.max(1, Math.min(4, fronts.length)))];
      const step = below(3);
      if (step === 0 && front) {
        const to = Math.min(front[1], front[0] + 1 + below(200));
        // Now and then a whole answer brings again what is there.
        const from = below(5) === 0 ? 0 : front[0];
        for (const [position, piece] of blob.accept(from, bytes.subarray(from, to), room)) {
          assert.deepEqual(piece, bytes.subarray(position, position + piece.length));
          unwritten.push([position, piece.length]);
        }
        front[0] = to;
        if (to === front[1]) fronts.splice(fronts.indexOf(front), 1);
      } else if (step === 1 && unwritten.length > 0) {
        const [written] = unwritten.splice(below(unwritten.length), 1);
        if (written) blob.markWritten(...written);
      } else readBack(blob, bytes, room);
    }
    while (readBack(blob, bytes, room));

    assert.deepEqual([blob.doneBytes, blob.hashedTo, blob.missing()], [size, size, []]);
    assert.equal(room.leftBytes, roomBytes, "what waited in memory is let go");
    assert.ok(blob.verify());
  }
});

test("pieces as small as a server likes, that all come early: hashed, and few of them in memory", () => {
  const size = 200_000;
  const bytes = Buffer.alloc(size, "early");
  const digest = `sha256:${createHash("sha256").update(bytes).digest("hex")}`;
  const accept = (room: EarlyRoom, size: number) => {
    const blob = new BlobState({ mediaType: "", digest, size }, registry);
    for (let at = size - 1; at >= 0; at -= 1) blob.accept(at, bytes.subarray(at, at + 1), room);
    return blob;
  };

  const blob = accept(new SmallRoom(size), size);
  assert.equal(blob.hashedTo, size);
  assert.ok(blob.verify());

  const room = new EarlyRoom();
  let pieces = 0;
  while (room.take(1)) pieces += 1;
  assert.ok(pieces <= 4096, `${pieces} pieces`);
  for (let piece = 0; piece < pieces; piece += 1) room.giveBack(1);
  assert.ok(room.take(internals.TUNING.earlyBytes), "all of it is given back");
});

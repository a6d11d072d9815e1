// The command that pulls into app.tar: run to its end, or ended by a signal when so many bytes have
// come.
import assert from "node:assert/strict";
import { existsSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { type CommandResult, runCommand, startCommand } from "./command.ts";
import type { TestImage } from "./image.ts";
import { NAME, type Served } from "./pull.ts";
import { gate, type Registry, untilRead } from "./registry.ts";

export const OPTIONS = ["--scheme", "http", "--platform", "linux/amd64", "--name", NAME];

export async function succeed(args: string[], cwd?: string): Promise<CommandResult> {
  const result = await runCommand([...OPTIONS, ...args], cwd === undefined ? {} : { cwd });
  assert.equal(result.exitCode, 0, result.stderr);
  return result;
}

export interface Budget {
  spent: Promise<void>;
  sentBytes: () => number;
  remove: () => void;
}

/** The registry serves so many bytes of blobs, over all connections, and then nothing more. */
export function serveOnly(registry: Registry, budgetBytes: number): Budget {
  let sentBytes = 0;
  const spent = gate();
  const { remove } = registry.on(
    { kind: "blob" },
    {
      handler: async (_request, response, next) => {
        const write = response.write.bind(response) as (chunk: Buffer) => boolean;
        response.write = ((chunk: Buffer) => {
          const allowed = chunk.subarray(0, budgetBytes - sentBytes);
          sentBytes += allowed.length;
          const goesOn = allowed.length > 0 && write(allowed);
          if (sentBytes === budgetBytes) spent.open();
          return goesOn && allowed.length === chunk.length;
        }) as typeof response.write;
        await next();
      },
    },
  );
  return { spent: spent.promise, sentBytes: () => sentBytes, remove };
}

/** What was asked for of a blob, in the order of its bytes. */
function rangesAsked(
  registry: Registry,
  digest: string,
  sizeBytes: number,
): [from: number, to: number][] {
  const ranges = registry.blobRequests(digest).map(({ range }): [number, number] => {
    const [, first, last] = /^bytes=(\d+)-(\d+)$/.exec(range ?? "") ?? [];
    return range === undefined ? [0, sizeBytes] : [Number(first), Number(last) + 1];
  });
  return ranges.sort(([left], [right]) => left - right);
}

/**
 * Bytes of an image's blobs that were asked for, none of them twice from the same place. Besides, a
 * registry may have sent what nobody read: the end of an answer whose connection was closed, since
 * others had taken that over. How much of it lies in the sockets then is the system's affair.
 */
export function askedBytes(registry: Registry, { blobs, layers }: TestImage): number {
  let asked = 0;
  for (const [digest, { length }] of blobs) {
    let end = 0;
    for (const [from, to] of rangesAsked(registry, digest, length)) {
      asked += Math.max(0, to - Math.max(from, end));
      end = Math.max(end, to);
    }
  }
  for (const { digest } of layers) {
    const starts = rangesAsked(registry, digest, 0).map(([from]) => from);
    assert.equal(new Set(starts).size, starts.length, "twice from the same place");
  }
  return asked;
}

/**
 * Waits until each thread of a process sleeps: what a busy machine had no processor for yet is in
 * place then. Only Linux shows it.
 */
async function untilIdle(pid: number): Promise<void> {
  const folder = `/proc/${pid}/task`;
  const isAsleep = (task: string) => {
    const file = `${folder}/${task}/stat`;
    return !existsSync(file) || /\) S /.test(readFileSync(file, "latin1"));
  };
  for (let looks = 0; looks < 2 && existsSync(folder); looks += 1) {
    await new Promise(setImmediate);
    if (!readdirSync(folder).every(isAsleep)) looks = -1;
  }
}

/** Runs the command until it has got so many bytes of blobs, and ends it by this signal. */
export async function interrupt(
  { registry, reference, dest }: Served,
  atBytes: number,
  signal: NodeJS.Signals,
  args: string[] = [],
): Promise<CommandResult & { sentBytes: number; pid: number }> {
  const budget = serveOnly(registry, atBytes);
  const { child, result } = startCommand([...OPTIONS, ...args, reference, dest]);
  await Promise.race([
    budget.spent,
    result.then(({ stderr }) => assert.fail(`ended before its time: ${stderr}`)),
  ]);
  await untilRead(registry);
  await untilIdle(child.pid ?? 0);
  child.kill(signal);
  const ended = await result;
  await registry.settled();
  budget.remove();
  registry.forget();
  return { ...ended, sentBytes: budget.sentBytes(), pid: child.pid ?? 0 };
}

export function flip(file: string, at: number): void {
  const bytes = readFileSync(file);
  bytes[at] = (bytes[at] ?? 0) ^ 0xff;
  writeFileSync(file, bytes);
}

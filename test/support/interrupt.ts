// The command that pulls into app.tar: run to its end, or ended by a signal when so many bytes have
// come.
import assert from "node:assert/strict";
import { readFileSync, writeFileSync } from "node:fs";
import { type CommandResult, runCommand, startCommand } from "./command.ts";
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

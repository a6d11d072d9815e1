// The command's own main() within the test's process: a case costs a millisecond instead of a
// process.
import { Readable, Writable } from "node:stream";
import { main } from "../../imgpull.ts";
import { cleanEnvironment, recordOutput } from "./command.ts";

export interface MainOptions {
  stdin?: string;
  /** Laid over the clean environment of command.ts. */
  env?: Record<string, string>;
  /** stdout and stderr are terminals, of this width. */
  terminalColumns?: number;
}

export interface MainResult {
  exitCode: number;
  stdout: Buffer;
  stderr: string;
}

class Collector extends Writable {
  readonly chunks: Buffer[] = [];
  isTTY?: boolean;
  columns?: number;

  override _write(chunk: Buffer, _encoding: string, done: () => void): void {
    this.chunks.push(Buffer.from(chunk));
    done();
  }

  get bytes(): Buffer {
    return Buffer.concat(this.chunks);
  }
}

/** Anything thrown is a bug of the command, and fails the test. */
export async function runMain(args: string[], options: MainOptions = {}): Promise<MainResult> {
  const { stdin = "", env = {}, terminalColumns } = options;
  const stdout = new Collector();
  const stderr = new Collector();
  if (terminalColumns !== undefined) {
    for (const stream of [stdout, stderr])
      Object.assign(stream, { isTTY: true, columns: terminalColumns });
  }
  const io = {
    stdin: Readable.from([Buffer.from(stdin)]),
    stdout,
    stderr,
    env: { ...cleanEnvironment(), ...env },
  };
  const exitCode = await main(args, io);
  recordOutput(stdout.bytes);
  recordOutput(stderr.bytes);
  return { exitCode, stdout: stdout.bytes, stderr: stderr.bytes.toString("utf8") };
}

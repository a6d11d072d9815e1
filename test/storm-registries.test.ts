// Registries, token services and mirrors made up at random: whatever they do, a pull that can
// succeed does, within few requests, and no credential is at a wrong place. Each run has a seed of
// its own, which it prints: IMGPULL_SEED repeats it, IMGPULL_STORM makes it so many times longer.
import assert from "node:assert/strict";
import { test } from "node:test";
import { SECRETS, type TestScope, USER } from "./support/command.ts";
import { makeImage, makeIndex } from "./support/image.ts";
import { assertPulled, type PullOptions, tryPull } from "./support/pull.ts";
import {
  type AuthOptions,
  type Fault,
  type Matcher,
  type Registry,
  startRegistry,
} from "./support/registry.ts";

const SEED = Number(process.env.IMGPULL_SEED ?? Date.now() % 1_000_000);
const LENGTH = Number(process.env.IMGPULL_STORM ?? 1);

class Dice {
  #state: number;

  constructor(seed: number) {
    this.#state = seed;
  }
  chance(share: number): boolean {
    this.#state = (this.#state * 1_103_515_245 + 12_345) % 2_147_483_648;
    return this.#state / 2_147_483_648 < share;
  }
  pick<T>(...choices: readonly T[]): T {
    this.chance(1);
    return choices[Math.floor((this.#state / 2_147_483_648) * choices.length)] as T;
  }
}

/** Each round has a scope of its own, so that its registry is gone before the next begins. */
async function inRounds(count: number, run: (scope: TestScope) => Promise<void>): Promise<void> {
  for (let round = 0; round < count * LENGTH; round += 1) {
    const endings: (() => unknown)[] = [];
    try {
      await run({ after: (ending) => endings.push(ending) });
    } finally {
      for (const end of endings) await end();
    }
  }
}

const kindsOf = ({ requests }: Registry) =>
  requests.map(({ server, kind, method, status }) => `${server} ${method} ${kind} ${status}`);

// ====== Handshakes ======

const image = makeImage({ seed: "storm", layers: [4096, 5000, 6000] });

interface Handshake {
  auth: AuthOptions;
  /** What a request without credentials is answered, whatever the mode. */
  silent: Fault | undefined;
  who: "nobody" | "stored" | "options" | "identity";
  isRight: boolean;
  concurrency: number;
}

const SILENT: Fault[] = [
  { status: 403 },
  { status: 404 },
  { status: 401 },
  { status: 401, headers: { "www-authenticate": "" } },
];

function throwHandshake(dice: Dice): Handshake {
  const who = dice.pick("nobody", "stored", "options", "identity");
  const postStatus = dice.pick(undefined, 302, 404, 405, 501);
  const tokenUses = dice.pick(Infinity, Infinity, 1, 2);
  const scope = dice.pick(undefined, null, "*", "repository:other:pull", "aws");
  const isPassword = who === "identity" && postStatus !== undefined; // then it is the password of a GET
  const auth: AuthOptions = {
    mode: dice.pick("none", "basic", "bearer", "bearer", "bearer"),
    anonymous: dice.pick("welcome", "refused", "useless"),
    tokenServer: dice.pick("same", "second"),
    refusedStatus: dice.pick(401, 403),
    staleStatus: dice.pick(400, 401),
    tokenField: dice.pick("token", "access_token", "both"),
    tokenUses,
    expiresIn: dice.pick(1, 300),
    ...(scope !== undefined && { scope }),
    ...(postStatus !== undefined && { postStatus }),
    ...(isPassword && { password: SECRETS.identityToken }),
  };
  return {
    auth,
    silent: dice.chance(0.3) ? dice.pick(...SILENT) : undefined,
    who,
    isRight: dice.chance(0.6),
    // Connections would use up each other's tokens.
    concurrency: tokenUses === Infinity ? dice.pick(1, 4, 8) : 1,
  };
}

const base64 = (text: string) => Buffer.from(text).toString("base64");

function optionsFor({ who, isRight, concurrency }: Handshake, host: string): PullOptions {
  const options = { scheme: "http", concurrency } as const;
  const password = isRight ? SECRETS.password : "wrong";
  if (who === "nobody") return options;
  if (who === "options") return { ...options, username: USER, password };

  const identity = {
    identitytoken: isRight ? SECRETS.identityToken : "wrong",
    auth: base64(`${USER}:`),
  };
  const entry = who === "identity" ? identity : { auth: base64(`${USER}:${password}`) };
  const environment = { DOCKER_AUTH_CONFIG: JSON.stringify({ auths: { [host]: entry } }) };
  return { ...options, environment };
}

/** Whether it has to succeed, or to fail; undefined where both are right. */
function expected({ auth, silent, who, isRight }: Handshake): boolean | undefined {
  const { mode, anonymous, tokenUses } = auth;
  if (mode === "none") return silent === undefined;
  const canShow = who !== "nobody" && isRight && !(mode === "basic" && who === "identity");
  if (canShow) return tokenUses === 1 ? undefined : true; // one that serves once may look like one that never does
  if (mode === "basic" || (who === "options" && !isRight)) return false;
  return silent || tokenUses === 1 ? undefined : anonymous === "welcome";
}

function assertShownRight({ auth, who }: Handshake, registry: Registry, told: string): void {
  for (const { server, kind, headers } of registry.requests) {
    const { authorization } = headers;
    if (authorization === undefined) continue;
    const isBearer = authorization.startsWith("Bearer ");
    assert.notEqual(kind, "storage", told);
    assert.equal(isBearer, kind !== "token" && auth.mode === "bearer", `${server} ${kind} ${told}`);
    assert(isBearer || who !== "nobody", told);
  }
}

test(`handshakes at random, seed ${SEED}`, { timeout: 300_000 }, async () => {
  const dice = new Dice(SEED);
  await inRounds(150, async (scope) => {
    const handshake = throwHandshake(dice);
    const registry = await startRegistry({ auth: handshake.auth, storage: {} }, scope);
    const reference = registry.add(image, "team/app", "1.0");
    const isContent = (kind: string) => !["token", "ping", "storage"].includes(kind);
    const ofNobody: Matcher = {
      where: ({ kind, headers }) => isContent(kind) && headers.authorization === undefined,
      beforeAuth: true,
    };
    if (handshake.silent) registry.on(ofNobody, handshake.silent);
    if (dice.chance(0.4)) registry.on({ kind: "blob" }, { redirect: "storage" });

    const { error, warnings } = await tryPull(
      scope,
      reference,
      optionsFor(handshake, registry.host),
    );
    const told = `${JSON.stringify(handshake)}\n${error?.message}\n${kindsOf(registry).join("\n")}`;
    const isExpected = expected(handshake);
    if (isExpected !== undefined) assert.equal(error === undefined, isExpected, told);
    assert(registry.requests.length <= 36, told);
    assert(warnings.filter((words) => words.includes("credentials")).length <= 1, told);
    assertShownRight(handshake, registry, told);
    const isBlamed = /refused: the credentials/.test(error?.message ?? "");
    if (isBlamed && handshake.auth.mode !== "none") assert.equal(handshake.isRight, false, told);
  });
});

// ====== Mirrors ======

const child = makeImage({ seed: "storm", layers: [4096, 200_000, 6000, 1_500_000] });
const index = makeIndex([child, makeImage({ seed: "other", platform: "linux/arm64" })]);

function throwFault(dice: Dice): Fault {
  return dice.pick<Fault>(
    { status: dice.pick(400, 401, 403, 404, 416, 418, 429, 500, 503) },
    { status: 429, headers: { "retry-after": "1000" } },
    { status: 206, body: "x" },
    { reset: true },
    { dropAfter: dice.pick(0, 10, 100, 3000, 100_000) },
    { corruptAt: dice.pick(0, 5, 5000, 190_000) },
    { body: "<html>", headers: { "content-type": "text/html" } },
    { body: Buffer.alloc(4096, 7) },
    { contentLength: dice.pick<number | "chunked" | "close">(-5, 7, "chunked", "close") },
    { ignoreRange: true },
    { contentEncoding: "gzip" },
    { redirect: dice.pick("storage", "self", "http://127.0.0.1:1/nowhere") },
  );
}

async function startMirror(dice: Dice, scope: TestScope, faults: string[]): Promise<Registry> {
  const mirror = await startRegistry({ prefix: "hub/", storage: {} }, scope);
  mirror.add(index, "team/app", "1.0");
  for (let left = dice.pick(1, 1, 2, 3); left > 0; left -= 1) {
    const matcher: Matcher = {
      kind: dice.pick("manifest", "config", "layer", "layer", "blob"),
      ...(dice.chance(0.4) && { times: dice.pick(1, 2, 3) }),
      ...(dice.chance(0.3) && { skip: dice.pick(1, 2) }),
    };
    const fault = throwFault(dice);
    faults.push(`${mirror.host} ${JSON.stringify([matcher, fault]).slice(0, 200)}`);
    mirror.on(matcher, fault);
  }
  if (dice.chance(0.1)) await mirror.close();
  return mirror;
}

test(`mirrors at random before a registry that is right, seed ${SEED}`, {
  timeout: 300_000,
}, async () => {
  const dice = new Dice(SEED);
  await inRounds(60, async (scope) => {
    const registry = await startRegistry({}, scope);
    const reference = registry.add(index, "team/app", "1.0");
    const faults: string[] = [];
    const mirrors: Registry[] = [];
    for (let left = dice.pick(1, 1, 2, 3); left > 0; left -= 1)
      mirrors.push(await startMirror(dice, scope, faults));

    const outcome = await tryPull(scope, reference, {
      scheme: "http",
      concurrency: dice.pick(1, 2, 8),
      retries: dice.pick(0, 1, 5),
      mirrors: { [registry.host]: mirrors.map(({ host }) => `${host}/hub`) },
    });
    const told = [...faults, outcome.error?.message, ...outcome.warnings].join("\n");
    assert.equal(outcome.error, undefined, told);
    assertPulled(outcome, child);
    for (const mirror of mirrors) {
      const isOf = (words: string) => words.startsWith(`the mirror ${mirror.host}`);
      assert(outcome.warnings.filter(isOf).length <= 1, told);
      assert(mirror.requests.length <= 30, `${told}\n${kindsOf(mirror).join("\n")}`);
    }
  });
});

/* Running a table over the start of a message: what mesh/express/machine.py does, step for step. */

#define REG_BAD 7 /* an action met its bit twice */
#define REG_END 6
#define UNENDED 0xffffffff /* what REG_END says when the bytes ended before the table did */
#define DONE 1
#define ACT 0x8000
#define LOOP 0x4000 /* on an edge: the state stays where it is for whatever is_text() */
#define BLOCK_SHIFT 13 /* above a state's bits */
#define EACH(byte) (0x0101010101010101ull * (byte))

/* Eight bytes from ' ' to '~' */
static inline bool is_text(u64 x)
{
  return !((x | (x + EACH(1)) | ~((x | EACH(0x80)) - EACH(0x20))) & EACH(0x80));
}

#define WHOLE_BYTES_MAX (PL_X_HEAD_BYTES - 8) /* of a head that is kept as a whole */
#define TAIL_BYTES 16

/* It is below that anyway. The verifier of 6.1 does not know: what it learns of a number, it does not learn of its copy on the
 * stack, which the compiler may take. */
static inline u64 within_head(u64 x)
{
  asm volatile("" : "+r"(x));
  return x & (PL_X_HEAD_BYTES - 1);
}

/* [d, end) begins with this socket's last head, byte for byte: what the registers say of that holds for it */
static inline bool as_last(struct pl_xend *e, u8 *d, u8 *end)
{
  u64 nought = e->pad & 1, rest = (u64)e->reg[REG_END] - TAIL_BYTES, other; /* nought: as in walk() */
  u8 *at;

  asm volatile("" : "+r"(rest));
  if (rest > WHOLE_BYTES_MAX - TAIL_BYTES)
    return false;
  at = d + within_head(rest);
  if (at + TAIL_BYTES > end)
    return false;
  other = (*(u64 *)at ^ e->tail[0]) | (*(u64 *)(at + 8) ^ e->tail[1]);
  KEEP_LOOP
  for (u64 i = 0; i < PL_X_HEAD_BYTES / 8; i += 2) {
    if (8 * i >= rest)
      break;
    asm volatile("" : "+r"(nought));
    at = d + nought + 8 * i;
    if (at + 16 > end)
      return false;
    other |= (*(u64 *)at ^ e->words[i]) | (*(u64 *)(at + 8) ^ e->words[i + 1]);
  }
  return !other;
}

/* The table's run over [d, end). Registers and result are in the socket's storage, or the verifier would follow each of their
 * values; the action is arithmetic, or it would follow each kind.
 *
 * Each step waits for the one before, and mostly for the CPU's second cache. So eight bytes at a time are taken where they
 * are those of this socket's last head in that place: what a table does over the same bytes from the same state is the same. */
static inline void walk(struct pl_xend *e, u8 *d, u8 *end, u32 root, u32 stamp)
{
  u32 block = root / PL_X_STATES;
  u64 loops = 0, state = root % PL_X_STATES; /* 64 bits wide like the registers: narrower ones cost two shifts a step */
  u16 *rows = xrows.lookup(&block);
  struct pl_xact *acts = xacts.lookup(&block);
  u64 was = 0, word = 0, acted = ACT; /* since the last place of eight bytes; ACT also: they are not to be kept */
  u64 nought = e->pad & 1; /* always, which the verifier does not know: it forgets how far each way has looked, and they join */
  u64 rest;
  u8 *tail;

  e->whole = 0;
  e->judged = 0;
  e->saved = 0;
  e->reg[REG_END] = 0;
  if (!rows || !acts)
    return;
  e->reg[REG_END] = UNENDED;
  e->reg[PL_XA_RULE] = 0;
  e->reg[PL_XA_ONCE] = 0;
  e->reg[PL_XA_DIGIT] = 0;
  e->reg[PL_XA_MATCH] = 0;
  e->reg[PL_XA_STATUS] = 0;
  e->reg[REG_BAD] = 0;
  KEEP_LOOP
  for (u64 i = 0; i < PL_X_HEAD_BYTES; i++) {
    u64 byte, edge, known, from = state;
    struct pl_xstep *step;
    u16 *row = rows + from * 256;
    u8 *at;

    asm volatile("" : "+r"(nought));
    at = d + nought + i;
    if (!(i & 7)) {
      if (!(acted & ACT) && i && i <= 8 * PL_X_STEPS) {
        step = &e->steps[i / 8 - 1];
        *(u64 *)step = was | (from | loops) << 48;
      }
      acted = ACT;
      if (i + 8 < PL_X_HEAD_BYTES && at + 8 <= end) {
        word = *(u64 *)at;
        if (i < 8 * PL_X_STEPS) {
          was = stamp | (from | (u64)block << BLOCK_SHIFT) << 32;
          step = &e->steps[i / 8];
          known = *(u64 *)step;
          if (e->words[i / 8] == word && (known ^ was) << 16 == 0) {
            state = known >> 48 & (PL_X_STATES - 1);
            loops = known >> 48 & LOOP;
            i += 7;
            continue;
          }
          *(u64 *)step = 0; /* it was of other bytes */
          acted = 0;
        }
        e->words[i / 8] = word;
        if (loops && is_text(word)) {
          acted = ACT;
          i += 7;
          continue;
        }
      }
    }
    if (at + 1 > end)
      break;
    byte = *at;
    asm volatile("" : "+r"(row)); /* else one sum of both is made with OR, after which Linux 6.1 knows no bounds */
    edge = row[byte];
    state = edge & (PL_X_STATES - 1);
    loops = edge & LOOP;
    acted |= edge;
    if (edge & ACT) {
      u32 kind = acts[from].kind & 7, value = acts[from].value, old = e->reg[kind];
      u32 digit = kind & (kind >> 1 | kind >> 2) & 1;            /* DIGIT, STATUS */
      u32 keep = digit * 10 + 1 - (kind & 1);                    /* those: 10; RULE: 0; ONCE, MATCH: 1 */
      u32 once = kind >> 1 & ~kind & ~(kind >> 2) & 1;

      e->reg[REG_BAD] |= old & value & (0 - once);
      e->reg[kind] = (old * keep & ~value) + value + digit * ((u32)byte - '0');
    }
    if (state <= DONE) {
      *(volatile u32 *)&e->reg[REG_END] = (u32)(state * (i + 1));
      break;
    }
  }
  rest = (u64)*(volatile u32 *)&e->reg[REG_END] - TAIL_BYTES;
  asm volatile("" : "+r"(rest));
  if (e->reg[REG_BAD] || rest > WHOLE_BYTES_MAX - TAIL_BYTES)
    return;
  tail = d + within_head(rest);
  if (tail + TAIL_BYTES > end)
    return;
  e->tail[0] = *(u64 *)tail;
  e->tail[1] = *(u64 *)(tail + 8);
  e->whole = stamp;
}

/* The length of the head that [d, end) begins with, 0 if the table has no answer */
static inline u32 scan(struct pl_xend *e, u8 *d, u8 *end, u32 root, u32 stamp)
{
  u32 n;

  if (e->whole != stamp || !as_last(e, d, end))
    walk(e, d, end, root, stamp);
  n = *(volatile u32 *)&e->reg[REG_END];
  return e->reg[REG_BAD] || n == UNENDED ? 0 : n;
}

/* The start of a message in one piece: a writev may have left it in several. false: not to be had */
static inline bool contiguous(struct sk_msg_md *m)
{
  u32 want = m->size < PL_X_HEAD_BYTES ? m->size : PL_X_HEAD_BYTES;
  u8 *d = m->data, *end = m->data_end;

  if (d + want <= end)
    return true;
  return bpf_msg_pull_data(m, 0, want, 0) == 0;
}

#define MESSAGE_BYTES_MAX (1 << 20) /* more than one can have */

/* All of it. Where the receiver's memory is at its limit, the kernel moves some pieces of a message and comes back with the
 * others as if they were a message of their own (bpf_tcp_ingress(), 6.1 to 6.18); one piece it moves, or fails send(). */
static inline bool in_one_piece(struct sk_msg_md *m)
{
  u32 size = m->size;
  u8 *d = m->data, *end = m->data_end;

  if (size > MESSAGE_BYTES_MAX)
    return false;
  if (d + size <= end)
    return true;
  return bpf_msg_pull_data(m, 0, size, 0) == 0;
}

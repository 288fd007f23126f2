/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The merge window: one page of guest RAM, and all who touch it.
 *
 * Stands for hw/dedup/engine/space/ (window.c, frozen.c, restore.c, discard.c,
 * punch.c, ksm.c, pass.c), host/freeze-uffd.c, host/freeze-mprotect.c, and
 * hw/dedup/ram-guard.c.  A comment names the file and the function that do a
 * step there; tests/check/check_model.py looks for them.
 *
 * Who runs, each of them without end: the scanner, who merges and drops zero
 * pages; a vCPU, who stores and loads; a device that writes by DMA and one
 * that reads; who discards the page (balloon, free page reporting, postcopy);
 * who needs RAM whole or unmerges, and then uses the RAM's file; ksmd, and who
 * makes the page mergeable; another member that has the segment mapped.
 *
 * One step is one system call or one access, as the kernel does it under
 * mmap_lock or a page table's lock.  "truth" is what the page holds by rights:
 * every load is compared with it.  Contents are 0 (what fresh memory has), 1
 * (what the segment has), 2.
 *
 * Options: ANON: the RAM is anonymous memory, else a shared file.  MPROTECT: it
 * is frozen by mprotect(), else by a userfaultfd.  M1, ...: faults, see
 * docs/devel/dedup-mutants.rst; X1, ..., FAST_KSM: see dedup-model.rst.
 *
 * Not here: other pages, huge pages but for what a punch does to one, swap, the
 * handler of SIGSEGV, vCPUs of KVM that are kept out.
 */

#include "page.inc"

/* ---- freezing ---- */

/* region.c: dedup_region_freeze() */
inline freeze(want_missing) {
    ok = 1;
#ifndef M2
    if
    :: UFFD ->
        /* freeze-uffd.c: uffd_begin(), uffd_register(), uffd_writeprotect() */
        atomic { reg = 1; missing = want_missing };
        wp = (!private || seg || anon != NONE)
    :: !UFFD ->
        /* freeze-mprotect.c: mprotect_announce() */
        open = 1;
        /* region.c: dedup_region_freezable() */
#ifdef M22
        ok = 1;
#else
        ok = !pins;
#endif
        /* freeze-mprotect.c: mprotect_begin(), mprotect_withdraw() */
        if
        :: ok -> ro = 1
        :: else -> atomic { open = 0; WAKE }
        fi
    fi
#endif
}

inline thaw() {
    if
    :: UFFD ->
        /* freeze-uffd.c: uffd_end() */
        atomic { reg = 0; missing = 0; wp = 0; gone = 0; looked = 0 };
        atomic { WAKE }
    :: !UFFD ->
        /* freeze-mprotect.c: mprotect_end(), mprotect_withdraw() */
        atomic { ro = 0; looked = 0 };
        atomic { open = 0; WAKE }
    fi
}

/* region.c: dedup_region_held() */
#define held (pins || (SHARED && readers))

/* restore.c: find_held(): may a device hold a copy, to write to it? */
#ifdef M16
#define restore_held false
#else
#define restore_held (pins && anon != NONE)
#endif

/* ksm.c: dedup_ksm_take_pages(), dedup_ksm_take_range() */
#ifdef M15
#define take_from_ksm skip
#else
#define take_from_ksm atomic { \
    mergeable = (private -> 0 : mergeable); ksm = (private -> 0 : ksm) }
#endif

/* ksm.c: dedup_ksm_kept_out() */
#if defined(M15) || defined(M2)
#define kept_out true
#else
#define kept_out (!UFFD || !private || anon == NONE || wp)
#endif

/* lock.c: dedup_space_lock(), dedup_space_unlock() */
#define lock() atomic { !locked -> locked = 1 }
inline unlock() {
    atomic {
        /* (I3) no window is open, so nobody waits for one */
        assert(!wait_cpu && !wait_dma && !wait_read);
        assert(!ro && !reg && !open);
        locked = 0
    }
}

/* punch.c: dedup_punch_replaced() */
inline punch_replaced() {
    atomic {
        assert(seg);              /* (I4) the replacement stands */
        if
#ifndef M11
        :: held -> late = 1
#endif
        :: else -> punch()
        fi
    }
}

/* window.c: next_window() */
#ifdef X1
#define may_merge true
#else
#define may_merge !closing
#endif

/* nobody stores to what is replaced (I1), who writes holds it not (I5) */
#define may_replace (VIEW == truth && pin != (private -> ANONYM : FILE))

/* ---- the scanner ---- */

/* frozen.c: drop_zero() */
inline drop_zero() {
    if
    :: own && SHARED -> atomic { assert(may_replace); punch() }
    :: own && !SHARED && !flushed ->
        atomic { assert(may_replace); throw_anon() }
    :: own && !SHARED && flushed
    :: !own ->
        if
        :: SHARED -> atomic { punch() }
        :: else
        fi;
        atomic { assert(may_replace); map_over(0) }
    fi
}

active proctype scanner() {
    bit own, zero, flushed, ok;

again:
    lock();
    /* pass.c: sync_entry() */
    atomic {
        if
        :: ledger == MERGED && anon != NONE -> ledger = BROKEN
        :: ledger == ZERO && (SHARED -> file != NONE : anon != NONE) ->
            ledger = OWN
        :: else
        fi
    };
    if
    :: (ledger == MERGED || ledger == BROKEN) && late ->
        /* punch.c: dedup_punch_late() */
        late = 0;
        punch_replaced();
        goto done
    :: else
    fi;
    /* window.c: next_window(), admit() */
    atomic {
        own = (ledger == OWN);
        ok = (own -> (SHARED -> file != NONE : anon != NONE)
                  : (ledger == BROKEN && anon != NONE)) &&
             !held && may_merge
    };
    if
    :: ok
    :: else -> goto done
    fi;
    if
    :: zero = 0
    :: zero = 1
    fi;
    take_from_ksm;
    freeze(0);
    if
    :: ok
    :: else -> goto done
    fi;
    /* frozen.c: judge() */
#ifndef M1
    ok = !held;
#endif
    /* frozen.c: content_fits() */
#ifndef M5
    ok = ok && VIEW == (zero -> 0 : segment);
#endif
    /* frozen.c: is_still_frozen() */
    atomic { ok = ok && kept_out; looked = ok };
    if
    :: ok
    :: else -> goto thawed
    fi;

    /* frozen.c: choose_flushed(), flush() */
    if
    :: UFFD && own ->
#ifndef X2
        /* freeze-uffd.c: uffd_readers() */
        atomic { reg = 1; missing = 1 };
#endif
        atomic {
            flushed = 1;
            if
            :: SHARED -> gone = 1
            :: else -> assert(may_replace); throw_anon()
            fi
        };
        if
        :: wp = 0                 /* frozen.c: unprotect() */
        :: skip                   /* not all of it was dropped */
        fi
    :: skip
    fi;

    /* frozen.c: replace_run() */
    if
    :: zero -> drop_zero(); thaw(); ledger = ZERO
    :: !zero ->
#ifdef M4
        if
        :: own && SHARED -> atomic { punch() }
        :: else
        fi;
#endif
        if
        :: atomic {
            /* frozen.c: map_segment() */
            assert(flushed || may_replace);
            assert(truth == segment);
            map_over(1)
           };
           thaw();
           /* frozen.c: enter() */
           ledger = MERGED;
#ifdef M9
           locked = 0; lock();
#endif
           /* frozen.c: punch_runs() */
           if
           :: own && SHARED -> punch_replaced()
           :: else
           fi
        :: atomic {
            /* it fails.  frozen.c: put_back(); freeze-uffd.c: uffd_refill() */
            if
            :: flushed && !SHARED && anon == NONE ->
#ifndef X3
                anon = segment;
#endif
                WAKE
            :: else
            fi
           };
           thaw()
        fi
    fi;
    goto done;
thawed:
    thaw();
done:
    atomic { own = 0; zero = 0; flushed = 0; ok = 0 };
    unlock();
    goto again
}

/* ---- who needs it whole ---- */

/* restore.c: restore_shared() */
inline restore_shared() {
    /* own.c: dedup_own_write() */
    file = VIEW;
    /* restore.c: is_still_frozen() */
    atomic { ok = kept_out; looked = ok };
    if
    :: ok ->
        atomic {
            /* own.c: dedup_own_map_back() */
            assert(may_replace && file == truth);
            map_over(0)
        };
        thaw();
        ledger = OWN
    :: true ->                    /* it failed, or KSM was here */
        punch_replaced();
        thaw()
    fi
}

/* restore.c: restore_private() */
inline restore_private() {
    atomic {
        if
        :: whole && anon == NONE -> stage = NONE
        :: else -> stage = VIEW
        fi
    };
    atomic { ok = kept_out; looked = ok };
    if
    :: ok ->
        atomic {
            /* own.c: dedup_own_move() */
            assert(may_replace);
            map_over(0);
            anon = stage;
            stage = NONE
        };
        thaw();
        ledger = OWN
    :: true -> thaw()             /* it failed, or KSM was here */
    fi
}

active proctype restorer() {
    bit whole, ok;

again:
    /* requests.c: dedup_region_remove(); space.c: dedup_space_close_region() */
    atomic { !locked -> closing = 1 };
#ifdef M24
    exported = SHARED;
#else
    /* walk.c: dedup_space_restore_next(), restore_next() */
    lock();
    /* restore.c: restore_part(), choose(), choose_whole() */
    atomic {
        if
        :: ledger == ZERO -> ledger = OWN
        :: else
        fi;
        whole = (ledger == OWN);  /* an own page, moved along */
        ok = (whole -> !SHARED && !pins : !restore_held)
    };
    if
    :: ok
    :: else -> goto done
    fi;
    take_from_ksm;                /* restore.c: take_from_ksm() */
    if
    :: SHARED
    :: else -> stage = 0
    fi;
    freeze(!SHARED);
    if
    :: ok
    :: else -> goto done
    fi;
    /* restore.c: choose_again(), choose_whole() */
    ok = (whole -> !pins : !restore_held);
    if
    :: ok && SHARED -> restore_shared()
    :: ok && !SHARED -> restore_private()
    :: else -> thaw()
    fi;
done:
    atomic {
        exported = (SHARED && (ledger == OWN || ledger == ZERO));
        stage = NONE; whole = 0; ok = 0
    };
    unlock();
#endif
    /* (I6) who has the file mapped finds it whole, and may write to it */
    do
    :: atomic { exported && !given ->
        assert((file == NONE -> 0 : file) == truth) }
    :: atomic { exported && !given -> file = 2; hold(2) }
    :: break
    od;
    /* requests.c: dedup_region_open() */
    atomic { !locked -> exported = 0; closing = 0 };
    goto again
}

/* ---- who discards ---- */

active proctype discarder() {
    do
    :: atomic { !given && !busy && !rbusy -> given = 1 };
       /* discard.c: dedup_space_discard_begin(), discard_locked() */
       lock();
       atomic {
#ifndef X4
           if
           :: ledger == MERGED || ledger == BROKEN ->
               map_over(0)        /* own.c: dedup_region_map_own() */
           :: else
           fi;
#endif
           ledger = OWN           /* ledger.c: dedup_ledger_absent() */
       };
       /* ram-guard.c: ram_guard_discard_begin(), ram_guard_discard_end() */
       atomic {
           if
           :: SHARED -> punch()
           :: else -> throw_anon()
           fi;
           hold(0)
       };
       /* discard.c: dedup_space_discard_end() */
       unlock();
       given = 0
    od
}

/* ---- who writes and reads ---- */

inline vcpu_store(v) {
    if
    :: ro -> wait_cpu = open /* freeze-mprotect.c: wait_for_slot() */
    :: !ro && writer_waits -> wait_cpu = 1
    :: else -> store(v)
    fi
}

active proctype vcpu() {
    do
    :: atomic { !given && !wait_cpu -> vcpu_store(0) }
    :: atomic { !given && !wait_cpu -> vcpu_store(1) }
    :: atomic { !given && !wait_cpu -> vcpu_store(2) }
    :: atomic { !given && !wait_cpu ->
        if
        :: reader_waits -> wait_cpu = 1
        :: else -> assert(VIEW == truth)
        fi
       }
    od
}

active proctype dma_writer() {
    do
    :: atomic { !given -> busy = 1 };
       /* ram-guard.c: ram_guard_dma_map(), counter_raise() */
       pins = 1;
#ifndef M21
       /* ram-guard.c: wait_window(); freeze-mprotect.c: dedup_freeze_wait() */
       !open;
#endif
       /* the kernel pins the page */
       do
       :: atomic { !wait_dma && (ro || !writer_waits) ->
           assert(!ro);           /* the system call fails */
           fault_write();
           pin = (private -> ANONYM : FILE)
          };
          break
       :: atomic { !wait_dma && !ro && writer_waits -> wait_dma = 1 }
       od;
       do
       :: atomic {
           if
           :: pin == FILE -> file = 2
           :: else -> anon = 2
           fi;
           hold(2)
          }
       :: atomic { pin = FREE; busy = 0 }; break
       od;
       /* ram-guard.c: ram_guard_dma_unmap(), counter_lower() */
       if
       :: pins = 0
       :: break                   /* a device that leaks its counter */
       fi
    od
}

active proctype dma_reader() {
    do
    :: atomic { !given -> rbusy = 1 };
       readers = 1;
       do
       :: atomic { !wait_read && !reader_waits ->
           gone = 0;
           if
           :: private && anon != NONE -> rpin = ANONYM
           :: private && anon == NONE -> rpin = FORMER /* it never changes */
           :: else ->
               file = (file == NONE -> 0 : file);
               rpin = FILE
           fi;
           seen = 1 << truth
          };
          break
       :: atomic { !wait_read && reader_waits -> wait_read = 1 }
       od;
       atomic {
           assert(rpin != FILE || (seen & (1 << file)));
           assert(rpin != ANONYM || (seen & (1 << anon)));
           rpin = FREE; seen = 0; rbusy = 0
       };
       readers = 0
    od
}

/* ---- the kernel's own merging ---- */

/*
 * It puts a page without write protection there.  Between the last look at
 * that and the mapping, some microseconds, it does not come: "KSM" in
 * docs/devel/dedup-window.rst.
 */
active proctype ksmd() {
    do
    :: atomic { private && anon != NONE && mergeable && !ksm &&
                pin != ANONYM && rpin != ANONYM && (!looked || FAST_KSM) ->
        ksm = 1; wp = 0 }
    :: mergeable = 1
    od
}

/* ---- another member: its stores make copies, which nobody else sees ---- */

active proctype other() {
    do
    :: assert(segment == 1)       /* (I2) */
#ifdef M7
    :: segment = 2                /* segment.c: dedup_segment_accept() */
#endif
    od
}

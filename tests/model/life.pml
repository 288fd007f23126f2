/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The life of hints and segments: two members of a group, and all that they
 * share: the index, the table of segments with its lock, the rows of use.
 *
 * Stands for hw/dedup/engine/scan/ (scan.c, publish.c, ask.c, merge.c, leave.c,
 * names.c, upkeep.c), group/ (group-table.c, group-ask.c, group-join.c,
 * segment.c), index/index.c and figures.c.  A comment names the file and
 * the function that do a step there; tests/check/check_model.py looks for them.
 *
 * A member scans its page, publishes, announces, fetches, merges, tells what it
 * uses, lets go, withdraws, releases, forgets, sweeps, in any order; its guest
 * changes the page; it is killed at any step, and another one takes its slot.
 * Hints get lost at any time.  One step is one access to what is shared.
 *
 * Contents are 0 and 1; both have the same tag, so each hint is a hint for both.
 * A name (gid) is not given twice: the engine's come again when the table's place
 * was used 2047 times (next_gid()).
 *
 * At any time the guests stop, nobody dies any more, and each member does what a
 * pass's end does, by turns.  Then nothing may be left that nobody uses.
 *
 * Options: M5, M8, M12: docs/devel/dedup-mutants.rst.  X11, ...: guards that
 * have no mutant in the code.
 *
 * Not here: the proof's numbers and the sockets, members that estimate, another
 * directory (names.c: move()), lean segments but for that pages leave them.
 */

#ifndef NAMES
#define NAMES 2                   /* that are given out at most */
#endif
#ifndef KILLS
#define KILLS 1
#endif

#ifndef WIDTH
#define WIDTH 1
#endif
#define HINTS  WIDTH              /* of one line of the index; at most 2 */
#define PLACES WIDTH              /* of the table */
#define HELD   WIDTH              /* segments that a member holds */
#define ROUNDS 4

/* a hint: 0, or of a member, or of a name */
#define CAND(m)    (1 + (m))
#define CLAIMED(m) (3 + (m))
#define PUB(g)     (5 + (g))
#define is_cand(h)    ((h) == 1 || (h) == 2)
#define is_claimed(h) ((h) == 3 || (h) == 4)
#define is_pub(h)     ((h) > 5)
#define member_of(h)  (is_cand(h) -> (h) - 1 : (h) - 3)
byte hint[2];

/* segments: memory files; the kernel frees one that nobody has */
byte content[3];
bit sealed[3];
byte owners[3];               /* a bit for each member */

/* the table: the name 0 is a free place */
byte place[2];
bit place_member[2];
byte place_life[2];
byte given;                       /* the last name */

/* members */
bit alive[2];
bit busy[2];
byte life[2];                     /* incarnation */
byte kills = KILLS;
bit finish;
byte turn;

/* the guest's page: what it holds, and where it is mapped: 0: own memory */
bit page[2];
byte map[4];                      /* only [0], [1]: 1 + number of a holding */
byte hold_gid[4], hold_seg[4];    /* 2 * member + number; seg 0: none, 1 + s */
byte use[4];                      /* 2 * member + place: a name, 0: not used */

/* there is no name to be had */
#define full (given == NAMES || (place[0] && (PLACES == 1 || place[1])))
#define H(k, j)   (2 * (k) + (j))
#define other     (1 - k)
#define is_listed(g) ((g) && (place[0] == (g) || place[1] == (g)))
#define has_name(k, g) (alive[k] && \
    ((hold_seg[H(k, 0)] && hold_gid[H(k, 0)] == (g)) || \
     (hold_seg[H(k, 1)] && hold_gid[H(k, 1)] == (g))))
#define where_is(g) (place[0] == (g) -> 0 : 1)
#define find(k, g) (hold_seg[H(k, 0)] && hold_gid[H(k, 0)] == (g) -> 1 : \
    (hold_seg[H(k, 1)] && hold_gid[H(k, 1)] == (g) -> 2 : 0))
#define free_holding(k) (!hold_seg[H(k, 0)] -> 1 : ((HELD == 2 && !hold_seg[H(k, 1)]) -> 2 : 0))
#define free_segment (!owners[0] -> 1 : (!owners[1] -> 2 : \
                      (!owners[2] -> 3 : 0)))

#include "shared.inc"

/* holdings.c: dedup_holding_add() */
inline hold(g, s) {
    atomic {
        j = free_holding(k);
        assert(j);
        hold_gid[H(k, j - 1)] = g;
        hold_seg[H(k, j - 1)] = s;
        owners[s - 1] = owners[s - 1] | (1 << k);
        /* a name leads to one segment only */
        assert(!has_name(other, g) ||
               hold_seg[H(other, find(other, g) - 1)] == s);
        j = 0
    }
}

/* group-table.c: dedup_group_clear_use() */
inline clear_use(g) {
    atomic {
        use[H(k, 0)] = (use[H(k, 0)] == g -> 0 : use[H(k, 0)]);
        use[H(k, 1)] = (use[H(k, 1)] == g -> 0 : use[H(k, 1)])
    }
}

/* publish.c: dedup_publish_append(): a draft, which only we know */
inline draft(c) {
    s = (free_holding(k) -> free_segment : 0);
    if
    :: s -> content[s - 1] = c; sealed[s - 1] = 0; owners[s - 1] = 1 << k
    :: else -> replace(CLAIMED(k), CAND(k), ok)   /* publish.c: disclaim() */
    fi
}

/* publish.c: finish_draft(), seal_draft(), announce() */
inline publish() {
    alloc(g);
    atomic {
        if
        :: g ->
#ifndef X12
            sealed[s - 1] = 1;    /* segment.c: dedup_builder_finish() */
#endif
            hold(g, s)
        :: else ->
            owners[s - 1] = 0; content[s - 1] = 0;
            replace(CLAIMED(k), CAND(k), ok)
        fi
    };
    atomic {
        if
        :: g ->
            replace(CLAIMED(k), PUB(g), ok);
            if
            :: !ok -> insert(PUB(g))
            :: else
            fi
        :: else
        fi;
        done()
    }
}

/* group-ask.c: dedup_group_fetch(), segment.c: dedup_segment_accept() */
inline fetch(g) {
    atomic {
        s = 0;
        if
        :: has_name(other, g) && free_holding(k) ->
            s = hold_seg[H(other, find(other, g) - 1)];
#ifndef M12
            /* peer-server.c: proven_fd() */
            s = (page[k] == content[s - 1] -> s : 0);
#endif
            assert(!s || page[k] == content[s - 1])           /* (I10) */
        :: else
        fi;
        s = (s && sealed[s - 1] -> s : 0);
        if
        :: s -> owners[s - 1] = owners[s - 1] | (1 << k)
        :: else
        fi
    };
    atomic {
        if
        :: s -> hold(g, s)
        :: else
        fi
    }
}

/* frozen.c: content_fits() */
#ifdef M5
#define compare true
#else
#define compare (page[k] == content[hold_seg[H(k, j - 1)] - 1])
#endif

/* scan.c: decide(), act(), share(), try_member(), try_own(); merge.c: find() */
inline scan() {
    atomic {
        if
        :: hint[0] -> h = hint[0]
        :: hint[1] -> h = hint[1]
        :: hint[0] == 0 && hint[1] == 0 -> h = 0
        fi
    };
    if
    :: h == 0 -> atomic { insert(CAND(k)); done() }
    :: (is_cand(h) || is_claimed(h)) && member_of(h) == other && !alive[other] ->
        atomic { replace(h, CAND(k), ok); done() }
    :: is_claimed(h) && member_of(h) == other && alive[other] -> done()
    :: is_claimed(h) && member_of(h) == k ->
        atomic { replace(h, CAND(k), ok); done() }
    :: is_cand(h) && (member_of(h) == k || alive[other]) ->
        atomic {
            /* publish.c: dedup_publish_claim() */
            replace(h, CLAIMED(k), ok);
            if
            /* publish.c: dedup_publish_pair(): two pages of ours */
            :: ok && member_of(h) == k -> draft(page[k])
            /* ask.c: prepare(): the copy that is to be proven */
            :: ok && member_of(h) == other -> c = page[k]
            :: !ok
            fi
        };
        atomic {
            if
            :: ok && member_of(h) == other ->
                /* ask.c: ask_member(); group-ask.c: dedup_group_prove() */
                ok = (alive[other] && page[other] == c);
#ifdef M8
                ok = 1;
#endif
                if
                :: ok ->
                    assert(alive[other] && page[other] == c); /* (I10) */
                    draft(c)       /* ask.c: publish_proven() */
                :: else -> replace(CLAIMED(k), CAND(k), ok)
                fi
            :: else
            fi;
            h = 0; c = 0
        };
        if
        :: s -> publish()
        :: else -> done()
        fi
    :: is_pub(h) ->
        /* ask.c: dedup_ask_holding(); group-table.c: entry_read() */
        atomic {
            g = h - 5;
            ok = find(k, g) || is_listed(g);
            if
            :: !ok -> replace(h, CAND(k), ok); ok = 0
            :: else
            fi;
            h = 0
        };
        if
        :: ok && !find(k, g) -> fetch(g)
        :: else
        fi;
        atomic {
            j = find(k, g);
            if
            :: j && !map[k] && compare ->
                map[k] = j;
                s = hold_seg[H(k, j - 1)] - 1;
                assert(page[k] == content[s]);                /* (I1) */
                assert(sealed[s]);                            /* (I2) */
                assert(owners[s] & (1 << k))
            :: else
            fi;
            done()
        }
    fi
}

/* leave.c: dedup_scan_drop_unused(), leave_group(), withdraw() */
inline drop_unused() {
    i = 0;
    do
    :: atomic { i < HELD && hold_seg[H(k, i)] && map[k] != i + 1 ->
            g = hold_gid[H(k, i)];
            clear_use(g)
       };
       /* group-table.c: dedup_group_others_use() */
       ok = g && !(alive[other] && (use[H(other, 0)] == g ||
                                    use[H(other, 1)] == g));
       atomic {
           if
           :: ok ->
               hint[0] = (hint[0] == PUB(g) -> 0 : hint[0]);
               hint[1] = (hint[1] == PUB(g) -> 0 : hint[1])
           :: else
           fi
       };
       /* holdings.c: dedup_holding_drop(); segment.c: dedup_segment_free() */
       atomic {
           s = hold_seg[H(k, i)] - 1;
           owners[s] = owners[s] & (3 - (1 << k));
           if
           :: !owners[s] -> content[s] = 0; sealed[s] = 0
           :: else
           fi;
           hold_seg[H(k, i)] = 0; hold_gid[H(k, i)] = 0;
           s = 0
       };
       atomic {
           if
           :: ok -> release(g)
           :: else
           fi;
           g = 0; ok = 0; i++
       }
    :: atomic { i < HELD && !(hold_seg[H(k, i)] && map[k] != i + 1) -> i++ }
    :: i == HELD -> break
    od;
    i = 0
}

/* figures.c: tell_use(): of each holding, in its place of our row */
inline tell_use() {
    atomic {
        i = 0;
        do
        :: i < HELD ->
            g = hold_gid[H(k, i)];
            if
            :: hold_seg[H(k, i)] && is_listed(g) ->
                use[H(k, where_is(g))] = (map[k] == i + 1 -> g : 0)
            :: else
            fi;
            i++
        :: else -> break
        od;
        g = 0; i = 0; met = 0
    }
}

/* figures.c: walk(), walk_segment(); group-table.c: dedup_group_foreach_segment() */
inline walk() {
    tell_use();
    do
    :: atomic { i < PLACES ->
            g = place[i];
            ok = 0;
            if
            :: g ->
                j = find(k, g);
                met = met | (j -> j : 0);
                if
                :: !j && use[H(k, i)] == g -> use[H(k, i)] = 0
                :: else
                fi;
                ok = (use[H(k, i)] != g) &&
                     !(alive[other] && use[H(other, i)] == g) &&
                     (!alive[place_member[i]] ||
                      life[place_member[i]] != place_life[i] ||
                      (place_member[i] == k && !j));
                j = 0
            :: else
            fi
       };
       /* group-table.c: release_orphans(): in two walks */
       atomic {
           if
           :: ok && orphan[i] == g ->
#ifndef X14
               release(g);
#endif
               orphan[i] = 0
           :: else -> orphan[i] = (ok -> g : 0)
           fi;
           g = 0; ok = 0; i++
       }
    :: i == PLACES -> break
    od;
    i = 0;
    /* names.c: dedup_scan_forget_lost_names(), dedup_scan_name_holdings() */
    do
#ifndef X15
    :: atomic { i < HELD && hold_seg[H(k, i)] && !(met & (1 << i)) ->
            hold_gid[H(k, i)] = 0;     /* names.c: forget_name() */
            alloc(g);
            hold_gid[H(k, i)] = g      /* holdings.c: dedup_holding_rename() */
       };
       atomic {
           if
           :: g -> insert(PUB(g))      /* upkeep.c: dedup_upkeep_announce() */
           :: else
           fi;
           g = 0; i++
       }
    :: atomic { i < HELD && !(hold_seg[H(k, i)] && !(met & (1 << i))) -> i++ }
#else
    :: i < HELD -> i++
#endif
    :: i == HELD -> break
    od;
    atomic { i = 0; met = 0 }
}

/* upkeep.c: dedup_upkeep_sweep(), is_stale(); index-sweep.c: dedup_index_sweep() */
inline sweep() {
    i = 0;
    do
    :: atomic { i < HINTS ->
            h = hint[i];
#ifdef X16
            /* the table is looked at before */
            ok = (is_pub(h) && !is_listed(h - 5)); h = 0
       };
       atomic {
            h = hint[i]
#endif
       };
#ifndef X16
       ok = (is_pub(h) -> !is_listed(h - 5) :
                          (h && member_of(h) == other && !alive[other]));
#endif
       atomic {
           if
#ifndef X17
           :: ok && hint[i] == h ->
               /* what is taken out leads nowhere */
               assert(!is_pub(h) || !is_listed(h - 5));
               hint[i] = 0
#endif
           :: else
           fi;
           h = 0; ok = 0; i++
       }
    :: i == HINTS -> break
    od;
    i = 0
}

proctype member(bit k) {
    byte i, j, h, g, s, p, met;
    byte orphan[2];
    bit c, ok;

life_begins:
    {
        do
        :: atomic { !finish && !k -> busy[k] = 1 }; scan()
        :: atomic { !finish && !k -> busy[k] = 1 }; drop_unused(); busy[k] = 0
        :: atomic { !finish && !k -> busy[k] = 1 }; walk(); busy[k] = 0
        :: atomic { !finish && !k -> busy[k] = 1 }; sweep(); busy[k] = 0
        /* the other one does each of these in one step */
        :: atomic { !finish && k -> scan() }
        :: atomic { !finish && k -> drop_unused() }
        :: atomic { !finish && k -> walk() }
        :: atomic { !finish && k -> sweep() }
        :: atomic { finish && turn % 2 == k && turn < 2 * ROUNDS ->
            drop_unused(); walk(); sweep(); turn++ }
        :: finish && turn == 2 * ROUNDS -> break
        od
    } unless { !alive[k] };
    if
    :: alive[k] -> goto ended
    :: else
    fi;
    atomic {
        i = 0; j = 0; h = 0; g = 0; s = 0; p = 0; met = 0; c = 0; ok = 0;
        orphan[0] = 0; orphan[1] = 0
    };
dead:
    if
    :: atomic {
        /* group-join.c: take_slot(); group-file.c: dedup_group_slot_clear() */
        !finish -> alive[k] = 1; life[k] = life[k] + 1; page[k] = 1;
        use[H(k, 0)] = 0; use[H(k, 1)] = 0
       };
       goto life_begins
    :: finish && turn % 2 == k && turn < 2 * ROUNDS -> turn++; goto dead
    :: finish && turn == 2 * ROUNDS
    fi;
ended:
    skip
}

/* the guests, SIGKILL, and hints that get lost */
active proctype world() {
    byte k;

    do
    :: atomic { !finish && alive[1] -> page[1] = 1 - page[1]; map[1] = 0 }
    :: atomic { !finish && map[0] -> map[0] = 0 }   /* restored */
    :: atomic { !finish && map[1] -> map[1] = 0 }
    :: atomic { !finish && hint[0] -> hint[0] = 0 }
    :: atomic { !finish && hint[1] -> hint[1] = 0 }
    :: atomic { !finish && kills ->
        kills--;
        if
        :: k = 0
        :: k = 1
        fi;
        if
        :: alive[k] ->
            /* the kernel: its lock, its files, its memory */
            alive[k] = 0; busy[k] = 0; map[k] = 0; page[k] = 0;
            owners[0] = owners[0] & (3 - (1 << k));
            owners[1] = owners[1] & (3 - (1 << k));
            owners[2] = owners[2] & (3 - (1 << k));
            content[0] = (owners[0] -> content[0] : 0);
            content[1] = (owners[1] -> content[1] : 0);
            content[2] = (owners[2] -> content[2] : 0);
            sealed[0] = (owners[0] -> sealed[0] : 0);
            sealed[1] = (owners[1] -> sealed[1] : 0);
            sealed[2] = (owners[2] -> sealed[2] : 0);
            hold_seg[H(k, 0)] = 0; hold_gid[H(k, 0)] = 0;
            hold_seg[H(k, 1)] = 0; hold_gid[H(k, 1)] = 0
        :: else
        fi;
        k = 0
       }
    :: atomic { !finish && !busy[0] && !busy[1] -> finish = 1 }; break
    od;

    turn == 2 * ROUNDS;
    atomic {
        k = 0;
        do
        :: k < 2 ->
            /* what is in the table somebody has; what somebody has is there */
            assert(!place[k] || has_name(0, place[k]) || has_name(1, place[k]) ||
                   (!alive[0] && !alive[1]));
            assert(!alive[0] || !hold_seg[k] || is_listed(hold_gid[k]) ||
                   (!hold_gid[k] && full));
            assert(!alive[1] || !hold_seg[2 + k] || is_listed(hold_gid[2 + k]) ||
                   (!hold_gid[2 + k] && full));
            /* who has a segment uses it */
            assert(!hold_seg[k] || map[0] == k + 1);
            assert(!hold_seg[2 + k] || map[1] == k + 1);
            /* hints lead somewhere */
            assert(!is_pub(hint[k]) || is_listed(hint[k] - 5) ||
                   (!alive[0] && !alive[1]));
            assert(!(is_cand(hint[k]) || is_claimed(hint[k])) ||
                   alive[member_of(hint[k])] ||
                   (!alive[0] && !alive[1]));
            k++
        :: else -> break
        od;
        k = 0
    }
}

init {
    atomic {
        alive[0] = 1; alive[1] = 1;
        page[0] = 1; page[1] = 1;
        run member(0);
        run member(1)
    }
}
